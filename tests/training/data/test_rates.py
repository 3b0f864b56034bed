import pytest

from sora_fast.training.data.rates import common_rates, same_rate


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([], {}),
        ([30.0, 30.0], {30.0: 2}),
        ([60.0, 30.0, 30.0], {30.0: 2, 60.0: 1}),
        ([30000 / 1001, 30.0, 30.0], {30.0: 3}),
        ([24000 / 1001, 24.0, 25.0], {24000 / 1001: 2, 25.0: 1}),
        ([29.83, 29.97, 60.0, 30.02, 60.0], {29.83: 3, 60.0: 2}),
        ([0.5, 0.52, 0.5], {0.5: 2, 0.52: 1}),
        ([25.0, 50.0], {25.0: 1, 50.0: 1}),
        ([50.0, 25.0], {50.0: 1, 25.0: 1}),
    ],
)
def test_common_rates(rates: list[float], expected: dict[float, int]) -> None:
    assert list(common_rates(rates).items()) == list(expected.items())


def test_rates_within_a_hundredth_are_the_same() -> None:
    assert same_rate(30000 / 1001, 30)
    assert same_rate(24, 24000 / 1001)
    assert not same_rate(24, 25)
    assert not same_rate(29, 30)
