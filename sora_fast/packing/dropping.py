"""Token dropping: train on a random part of each sample's tokens, and so on more samples in the same time.

A rule says which share of its tokens a sample loses; `sample_keep` then draws the tokens that stay:

    rates = BetaDrop(mean=0.5, max_rate=0.85).rates(grids, rng)
    layout = PackedLayout.from_grids(grids, keep=sample_keep(grids, rates, rng))

How many tokens stay follows from the rate alone (`kept_tokens`), so samples can be packed before any index is drawn.

All rules and their constants are those of NaViT (Patch n' Pack, arXiv:2307.06304, appendices A.4 and A.5).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sora_fast.packing.order import Grid


class DropRule(Protocol):
    """How much of each sample to drop. most: the largest rate that `rates` gives."""

    @property
    def most(self) -> float: ...

    def rates(self, grids: Sequence[Grid], rng: np.random.Generator, *, step: int = 0) -> np.ndarray:
        """The share of tokens that each sample loses: float64 [S] in [0, 1].

        grids: (T, H, W) of each sample, in patches. step: training step, for rules that change over time.
        """
        ...


@dataclass(frozen=True)
class ConstantDrop:
    """Every sample loses the same share."""

    rate: float

    def __post_init__(self) -> None:
        _require_share("rate", self.rate)

    @property
    def most(self) -> float:
        """The largest rate that `rates` gives."""
        return self.rate

    def rates(self, grids: Sequence[Grid], rng: np.random.Generator, *, step: int = 0) -> np.ndarray:
        return np.full(len(grids), self.rate, dtype=np.float64)


@dataclass(frozen=True)
class BetaDrop:
    """Each sample draws its own rate, max_rate · Beta(α, β), of the given mean.

    Some samples stay whole while others lose most of their tokens, so that training meets the whole samples that
    inference will bring.

    spread: variance of the Beta as a share of the largest that its mean u allows, u(1 − u). 0.3 is NaViT's.
    """

    mean: float
    max_rate: float = 1.0
    spread: float = 0.3

    def __post_init__(self) -> None:
        _require_share("max_rate", self.max_rate)
        _require_share("mean", self.mean)
        if self.mean > self.max_rate:
            raise ValueError(f"mean must not exceed max_rate, got mean={self.mean}, max_rate={self.max_rate}")
        if not 0 < self.spread < 1:
            raise ValueError(f"spread must be between 0 and 1, both excluded, got {self.spread}")

    @property
    def most(self) -> float:
        """The largest rate that `rates` gives."""
        return self.max_rate

    def rates(self, grids: Sequence[Grid], rng: np.random.Generator, *, step: int = 0) -> np.ndarray:
        if self.mean in (0.0, self.max_rate):  # the Beta has shrunk to a point
            return np.full(len(grids), self.mean, dtype=np.float64)
        mean = self.mean / self.max_rate
        concentration = 1 / self.spread - 1  # α + β: the variance is mean(1 − mean) / (α + β + 1)
        return self.max_rate * rng.beta(mean * concentration, (1 - mean) * concentration, size=len(grids))


@dataclass(frozen=True)
class ResolutionDrop:
    """Large samples are the more redundant and lose more: the mean rate grows linearly with the token count.

    low, high: mean rate at min_tokens and fewer, and at max_tokens and more.
    std: of the normal distribution around the mean before it is cut off two of them away (0.02 is NaViT's); rates
        are then clipped to [0, 1].
    """

    low: float
    high: float
    min_tokens: int
    max_tokens: int
    std: float = 0.02

    def __post_init__(self) -> None:
        _require_share("low", self.low)
        _require_share("high", self.high)
        if not 0 <= self.min_tokens < self.max_tokens:
            raise ValueError(
                "min_tokens must be at least 0 and below max_tokens, "
                f"got min_tokens={self.min_tokens}, max_tokens={self.max_tokens}"
            )
        if not 0 <= self.std < math.inf:
            raise ValueError(f"std must be finite and not negative, got {self.std}")

    @property
    def most(self) -> float:
        """The largest rate that `rates` gives."""
        return min(1.0, max(self.low, self.high) + 2 * self.std)

    def rates(self, grids: Sequence[Grid], rng: np.random.Generator, *, step: int = 0) -> np.ndarray:
        tokens = _tokens(grids)
        mean = np.interp(tokens, (self.min_tokens, self.max_tokens), (self.low, self.high))
        return np.clip(mean + self.std * _normal_within(2.0, len(tokens), rng), 0.0, 1.0)


@dataclass(frozen=True)
class SigmoidDrop:
    """One rate for all samples, falling from `high` to `low` along a sigmoid over the training steps.

    Early on many samples in part, later fewer and whole. The rate is low + (high − low) · sigmoid((μ − step) / τ) with
    μ = middle · total_steps and τ = width · total_steps. The defaults are NaViT's (figure 15; it counts images, which
    is the same where every step takes as many).
    """

    total_steps: int
    high: float = 0.8
    low: float = 0.2
    middle: float = 0.5
    width: float = 0.1

    def __post_init__(self) -> None:
        _require_share("low", self.low)
        _require_share("high", self.high)
        _require_share("middle", self.middle)
        if self.low > self.high:
            raise ValueError(f"low must not exceed high, got low={self.low}, high={self.high}")
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        if not 0 < self.width < math.inf:
            raise ValueError(f"width must be finite and above 0, got {self.width}")

    @property
    def most(self) -> float:
        """The largest rate that `rates` gives."""
        return self.high

    def rates(self, grids: Sequence[Grid], rng: np.random.Generator, *, step: int = 0) -> np.ndarray:
        distance = (self.middle - step / self.total_steps) / self.width
        # The tanh form of the sigmoid cannot overflow, however far past the end a run goes.
        rate = self.low + (self.high - self.low) * (1 + math.tanh(distance / 2)) / 2
        return np.full(len(grids), rate, dtype=np.float64)


def kept_tokens(grids: Sequence[Grid], rates: np.ndarray) -> np.ndarray:
    """How many tokens of each sample stay, int64 [S]: rounded, at least one unless the sample is empty.

    grids: (T, H, W) of each sample, in patches. rates: share of tokens that each loses, [S] in [0, 1].
    """
    tokens = _tokens(grids)
    rates = np.asarray(rates, dtype=np.float64)
    if rates.shape != tokens.shape:
        raise ValueError(f"rates must have one entry a grid, shape {tokens.shape}, got {rates.shape}")
    if not np.all((rates >= 0) & (rates <= 1)):
        raise ValueError(f"rates must be in [0, 1], got {rates[~((rates >= 0) & (rates <= 1))][0]}")
    kept = np.rint((1 - rates) * tokens).astype(np.int64)
    return np.maximum(kept, np.minimum(tokens, 1))


def sample_keep(grids: Sequence[Grid], rates: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw the tokens that stay, uniformly and without replacement.

    Returns for each sample the raster indices t·H·W + h·W + w of `kept_tokens` tokens, ascending, int64: what
    `PackedLayout.from_grids(grids, keep=...)` takes. Arguments and errors as in `kept_tokens`.
    """
    counts = zip(_tokens(grids), kept_tokens(grids, rates), strict=True)
    return [np.sort(rng.choice(tokens, size=kept, replace=False, shuffle=False)) for tokens, kept in counts]


def _normal_within(bound: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Standard normal values, those beyond ±bound drawn again."""
    values = rng.standard_normal(count)
    while (beyond := np.abs(values) > bound).any():
        values[beyond] = rng.standard_normal(beyond.sum())
    return values


def _tokens(grids: Sequence[Grid]) -> np.ndarray:
    """Token count of each grid, int64 [S]."""
    array = np.asarray(grids) if len(grids) else np.empty((0, 3), dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "iu" or (array < 0).any():
        raise ValueError(f"grids must be (T, H, W) of whole numbers, none negative, got {grids!r}")
    return array.astype(np.int64).prod(axis=1)


def _require_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
