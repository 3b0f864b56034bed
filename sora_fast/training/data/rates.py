"""Frames per second of a data set: one rate, or which ones."""

import math
from collections import Counter
from collections.abc import Sequence


def same_rate(a: float, b: float) -> bool:
    """30 and 29.97 are one rate, and 24 and 23.976; what a phone records varies as little from clip to clip."""
    return math.isclose(a, b, rel_tol=0.01)


def common_rates(rates: Sequence[float]) -> dict[float, int]:
    """How many there are of each rate, most of them first; those that are the same count as the commonest of them."""
    counts: Counter[float] = Counter()
    for rate, count in Counter(rates).most_common():
        counts[next((other for other in counts if same_rate(rate, other)), rate)] += count
    return dict(counts.most_common())
