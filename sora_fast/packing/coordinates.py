"""A token's place (t, h, w) in one int32, so that one test on integers decides a whole box.

The fields are w:9, h:9 and t:10 bits, the lowest first, with a guard bit above each. Places count from 1: 0 lies before
every token, and a field's largest number behind all of them.
"""

from typing import Any

from torch import Tensor

# The largest token grid (T, H, W).
MAX_GRID = (1022, 510, 510)
GUARD = 1 << 9 | 1 << 19 | 1 << 30
# A place that lies in every box whose bounds are no larger than MAX_GRID: all of its bits are set, the guards' too. No
# `low` can take them away; to be subtracted from a `high`, each field must borrow, which sets the guard bit there.
EVERYWHERE = (1 << 31) - 1
# The lowest bits of t and of h.
T_SHIFT, H_SHIFT = 20, 10


def packed(t: Any, h: Any, w: Any) -> Any:
    """Places, counted from 1, in one int32 each; tensors or integers."""
    return t << T_SHIFT | h << H_SHIFT | w


def inside(place: Any, low: Any, high: Any) -> Any:
    """True where low ≤ place ≤ high on all three axes; packed places, tensors or integers."""
    return ((place | GUARD) - low) & ((high | GUARD) - place) & GUARD == GUARD


def fields(places: Tensor) -> list[tuple[Tensor, int]]:
    """The coordinates w, h, t in packed ones, each with its shift."""
    return [((places >> shift) & (1 << bits) - 1, shift) for shift, bits in ((0, 9), (H_SHIFT, 9), (T_SHIFT, 10))]
