"""A regression is one only beyond the noise, and only on the same device."""

import pytest

from sora_fast.report import Measurement, Result, Spread
from sora_fast.report.compare import compare, is_regression, labels


def _result(*spread: float, samples: int = 9, device: str = "GPU", commit: str = "a" * 40) -> Result:
    low, median, high = spread
    m = Measurement("adaln", "C64", "forward", "triton", Spread(median, low, high, samples))
    return Result("file.json", {"device": device, "commit": commit}, None, (m,))


BEFORE = _result(0.9, 1.0, 1.1)


@pytest.mark.parametrize(
    ("after", "verdict", "regressed"),
    [
        (_result(1.2, 1.3, 1.4), "slower", True),
        (_result(1.2, 1.3, 1.4, device="another"), "slower", False),
        (_result(1.05, 1.3, 1.4), "within the noise", False),
        (_result(0.6, 0.7, 0.8), "faster", False),
        (_result(0.6, 0.7, 0.95), "within the noise", False),
        (_result(1.2, 1.3, 1.4, samples=2), "too few rounds", False),
    ],
)
def test_verdict(after: Result, verdict: str, regressed: bool) -> None:
    (change,) = compare(BEFORE, after)
    assert change.verdict == verdict
    assert is_regression(change, BEFORE, after) == regressed
    assert change.ratio == pytest.approx(after.measurements[0].time.median)


def test_only_what_both_measured_is_compared() -> None:
    other = Measurement("adaln", "C128", "forward", "triton", Spread(1, 1, 1, 9))
    assert compare(BEFORE, Result("b.json", {}, None, (other,))) == []


def test_results_are_called_by_what_tells_them_apart() -> None:
    other = _result(1, 1, 1, commit="b" * 40 + "+changes")
    assert labels([BEFORE]) == ["GPU, aaaaaaa"]
    assert labels([BEFORE, other]) == ["aaaaaaa", "bbbbbbb+changes"]
    assert labels([BEFORE, _result(1, 1, 1, device="CPU")]) == ["GPU, aaaaaaa", "CPU, aaaaaaa"]
    again = Result("again.json", BEFORE.environment, None, BEFORE.measurements)
    assert labels([BEFORE, again]) == ["aaaaaaa (file.json)", "aaaaaaa (again.json)"]
