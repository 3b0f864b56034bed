import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_fast.packing import PackedLayout
from sora_fast.packing.dropping import (
    BetaDrop,
    ConstantDrop,
    DropRule,
    ResolutionDrop,
    SigmoidDrop,
    kept_tokens,
    sample_keep,
)

SAMPLES = 200_000  # the standard error of a mean is then about 0.001, of a standard deviation less

grids_strategy = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 6)), max_size=8)
RULES: list[DropRule] = [
    ConstantDrop(0.3),
    BetaDrop(mean=0.5, max_rate=0.85),
    ResolutionDrop(low=0.1, high=0.9, min_tokens=16, max_tokens=100),
    SigmoidDrop(total_steps=1000),
]


def grids_of(count: int) -> list[tuple[int, int, int]]:
    return [(1, 4, 4)] * count


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@given(grids=grids_strategy, seed=st.integers(0, 99), step=st.integers(0, 2000))
def test_rates_are_shares_and_repeat(rule: DropRule, grids: list[tuple[int, int, int]], seed: int, step: int) -> None:
    rates = rule.rates(grids, np.random.default_rng(seed), step=step)
    assert rates.dtype == np.float64 and rates.shape == (len(grids),)
    assert ((rates >= 0) & (rates <= 1)).all()
    assert np.array_equal(rates, rule.rates(grids, np.random.default_rng(seed), step=step))


def test_constant_rate() -> None:
    assert ConstantDrop(0.3).rates(grids_of(3), np.random.default_rng(0)).tolist() == [0.3] * 3


@pytest.mark.parametrize(("mean", "max_rate"), [(0.5, 1.0), (0.1, 0.4), (0.35, 0.4), (0.5, 0.7), (0.85, 0.9)])
def test_beta_moments(mean: float, max_rate: float) -> None:
    """The share u = d / max_rate has mean u and variance 0.3·u(1 − u)."""
    rates = BetaDrop(mean=mean, max_rate=max_rate).rates(grids_of(SAMPLES), np.random.default_rng(1))
    share = mean / max_rate
    assert np.mean(rates) == pytest.approx(mean, abs=0.003)
    assert np.var(rates / max_rate) == pytest.approx(0.3 * share * (1 - share), rel=0.02)
    assert rates.max() <= max_rate


@pytest.mark.parametrize(("mean", "max_rate", "printed"), [(0.1, 0.4, 60.3), (0.25, 0.7, 27.3), (0.35, 0.4, 1.3)])
def test_beta_has_the_published_tail(mean: float, max_rate: float, printed: float) -> None:
    """NaViT's figure 14a prints the percentage of samples that lose less than a tenth of their tokens."""
    rates = BetaDrop(mean=mean, max_rate=max_rate).rates(grids_of(SAMPLES), np.random.default_rng(2))
    assert 100 * np.mean(rates < 0.1) == pytest.approx(printed, abs=0.4)


def test_beta_ends_in_points() -> None:
    rng = np.random.default_rng(0)
    assert BetaDrop(mean=0.0).rates(grids_of(4), rng).tolist() == [0.0] * 4
    assert BetaDrop(mean=0.4, max_rate=0.4).rates(grids_of(4), rng).tolist() == [0.4] * 4
    assert BetaDrop(mean=0.0, max_rate=0.0).rates(grids_of(4), rng).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("grid", "mean"), [((1, 4, 4), 0.2), ((2, 5, 10), 0.5), ((4, 5, 5), 0.5), ((1, 23, 8), 0.8), ((9, 9, 9), 0.8)]
)
def test_resolution_moments(grid: tuple[int, int, int], mean: float) -> None:
    """The mean grows from 0.2 at 16 tokens to 0.8 at 184; a normal cut off at two σ has 0.8796 of its deviation."""
    rule = ResolutionDrop(low=0.2, high=0.8, min_tokens=16, max_tokens=184)
    rates = rule.rates([grid] * SAMPLES, np.random.default_rng(3))
    assert np.mean(rates) == pytest.approx(mean, abs=3e-4)
    cut = 2 * math.exp(-2) * 2 / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
    assert np.std(rates) == pytest.approx(0.02 * math.sqrt(1 - cut), rel=0.01)
    assert np.abs(rates - mean).max() <= 0.04 + 1e-12
    assert np.abs(rates - mean).max() > 0.0399
    assert abs(np.mean(((rates - mean) / 0.02) ** 3)) < 0.02  # cut off on both sides alike


def test_resolution_rates_stay_shares_at_the_ends() -> None:
    rule = ResolutionDrop(low=0.0, high=1.0, min_tokens=1, max_tokens=2)
    rates = rule.rates([(1, 1, 1), (1, 1, 2)] * 1000, np.random.default_rng(0))
    assert rates.min() == 0.0 and rates.max() == 1.0


def test_sigmoid_falls_from_high_to_low() -> None:
    rule, rng = SigmoidDrop(total_steps=1000), np.random.default_rng(0)
    rates = np.array([rule.rates(grids_of(2), rng, step=step) for step in range(0, 1001, 50)])
    assert (rates[:, 0] == rates[:, 1]).all() and (np.diff(rates[:, 0]) < 0).all()
    expected = [0.2 + 0.6 / (1 + math.exp((step - 500) / 100)) for step in range(0, 1001, 50)]
    np.testing.assert_allclose(rates[:, 0], expected, rtol=1e-12)
    assert rule.rates(grids_of(1), rng, step=10**9)[0] == pytest.approx(0.2)


@given(grids=grids_strategy, rate=st.floats(0, 1), seed=st.integers(0, 99))
def test_kept_tokens_are_distinct_sorted_and_as_many_as_said(
    grids: list[tuple[int, int, int]], rate: float, seed: int
) -> None:
    rates = np.full(len(grids), rate)
    keep = sample_keep(grids, rates, np.random.default_rng(seed))
    counts = kept_tokens(grids, rates)
    for (t, h, w), indices, count in zip(grids, keep, counts, strict=True):
        tokens = t * h * w
        assert indices.dtype == np.int64 and len(indices) == count
        assert (np.diff(indices) > 0).all()
        assert ((indices >= 0) & (indices < tokens)).all()
        assert abs(count - (1 - rate) * tokens) <= 0.5 or count == 1
        assert count >= min(tokens, 1)


def test_ends_of_the_rate() -> None:
    grids = [(2, 3, 4), (0, 3, 4), (1, 1, 1)]
    everything = sample_keep(grids, np.zeros(3), np.random.default_rng(0))
    assert [indices.tolist() for indices in everything] == [list(range(24)), [], [0]]
    assert kept_tokens(grids, np.ones(3)).tolist() == [1, 0, 1]


def test_every_token_is_equally_likely_to_stay() -> None:
    keep = np.concatenate(sample_keep(grids_of(20_000), np.full(20_000, 0.75), np.random.default_rng(4)))
    share = np.bincount(keep, minlength=16) / 20_000
    assert np.abs(share - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 20_000)


@given(grids=grids_strategy, seed=st.integers(0, 99))
def test_a_layout_takes_what_stays(grids: list[tuple[int, int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rates = BetaDrop(mean=0.5).rates(grids, rng)
    keep = sample_keep(grids, rates, rng)
    layout = PackedLayout.from_grids(grids, keep=keep)
    assert layout.cu_seqlens.diff().tolist()[: len(grids)] == kept_tokens(grids, rates).tolist()
    assert layout.raster_index.tolist() == [index for indices in keep for index in indices]


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (ConstantDrop, {"rate": 1.2}, r"rate must be in \[0, 1\], got 1.2"),
        (BetaDrop, {"mean": 0.8, "max_rate": 0.5}, "mean must not exceed max_rate"),
        (BetaDrop, {"mean": float("nan")}, "mean must be in"),
        (BetaDrop, {"mean": 0.5, "spread": 1.0}, "spread must be between 0 and 1"),
        (ResolutionDrop, {"low": 0.1, "high": 0.9, "min_tokens": 9, "max_tokens": 9}, "min_tokens must be"),
        (ResolutionDrop, {"low": -0.1, "high": 0.9, "min_tokens": 1, "max_tokens": 9}, "low must be in"),
        (ResolutionDrop, {"low": 0.1, "high": 0.9, "min_tokens": 1, "max_tokens": 9, "std": -1.0}, "std must be"),
        (SigmoidDrop, {"total_steps": 0}, "total_steps must be at least 1"),
        (SigmoidDrop, {"total_steps": 10, "high": 0.1}, "low must not exceed high"),
        (SigmoidDrop, {"total_steps": 10, "middle": 5.0}, "middle must be in"),
        (SigmoidDrop, {"total_steps": 10, "width": 0.0}, "width must be finite and above 0"),
    ],
)
def test_impossible_rules_are_refused(rule: type, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(**arguments)


def test_bad_grids_and_rates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rates must have one entry a grid, shape \(2,\), got \(1,\)"):
        kept_tokens(grids_of(2), np.array([0.5]))
    with pytest.raises(ValueError, match=r"rates must be in \[0, 1\], got nan"):
        kept_tokens(grids_of(2), np.array([0.5, np.nan]))
    for grids in ([(1, 2)], [(1, 2, -1)], [(1.0, 2.0, 3.0)]):
        with pytest.raises(ValueError, match=r"grids must be \(T, H, W\) of whole numbers"):
            kept_tokens(grids, np.zeros(1))
