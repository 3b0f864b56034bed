"""Token counts of made-up data sets, for measuring the packer."""

import numpy as np

SHORTEST, LONGEST = 64, 16_000


def image_video_mix(count: int, *, seed: int = 0) -> list[int]:
    """Six images to four videos, of many sizes, aspect ratios and durations: token counts from 64 to 16,000."""
    rng = np.random.default_rng(seed)
    image = rng.integers(8, 49, count) * rng.integers(8, 49, count)
    video = rng.integers(2, 33, count) * rng.integers(8, 33, count) * rng.integers(8, 33, count)
    tokens = np.where(rng.random(count) < 0.6, image, video)
    return np.clip(tokens, SHORTEST, LONGEST).tolist()


def log_uniform(count: int, *, seed: int = 0) -> list[int]:
    """Every scale from the shortest to the longest equally often."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), count)).astype(int).tolist()


def uniform(count: int, *, seed: int = 0) -> list[int]:
    """Mostly long videos, few short samples to close gaps with."""
    return np.random.default_rng(seed).integers(SHORTEST, LONGEST + 1, count).tolist()


def few_sizes(count: int, *, seed: int = 0) -> list[int]:
    """A data set cut to seven standard shapes: gaps that nothing fits exactly."""
    return np.random.default_rng(seed).choice([64, 256, 1024, 1560, 3600, 7800, 16_000], count).tolist()


class Shapes:
    """An endless source of nothing but shapes, over and over: with patches of 1×4×4, a token a frame."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def shape(self, index: int) -> tuple[int, int, int, int]:
        return 1, self.lengths[index % len(self.lengths)], 4, 4
