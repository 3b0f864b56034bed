"""SpacetimeMask: which tokens may attend which, as three intervals of coordinates."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Interval = tuple[int | None, int | None]

UNBOUNDED: Interval = (None, None)
# Beyond every coordinate, and far from the int32 limits when an offset is added.
_FAR = 1 << 20


class Tokens(Protocol):
    """What a mask asks of a `PackedLayout`, which is built on masks and so not imported here."""

    segment_ids: Tensor
    grids: Tensor
    coords: Tensor
    raster_index: Tensor
    is_joint: bool


@dataclass(frozen=True)
class SpacetimeMask:
    """Query i may attend key j iff both lie in one segment and lo ≤ coord(j) − anchor(i) ≤ hi on each of t, h, w.

    t, h, w: intervals (lo, hi), in tokens; None on a side means unbounded.
    stride: queries of a group of `stride` tokens along an axis share the anchor in the group's middle,
        c // s · s + (s − 1) // 2 (NATTEN's strided attention, sliding tile attention).
    clamp: per axis, shift the window so that it stays inside the grid (NATTEN's neighbourhood); needs finite bounds.
    causal_tokens: in addition, j does not come after i in raster order.

    The anchor is the query's own coordinate unless `stride` or `clamp` move it. What has no coordinates, the text of a
    `JointLayout`, sees all of its segment, and all of it sees that.
    """

    t: Interval = UNBOUNDED
    h: Interval = UNBOUNDED
    w: Interval = UNBOUNDED
    stride: tuple[int, int, int] = (1, 1, 1)
    clamp: tuple[bool, bool, bool] = (False, False, False)
    causal_tokens: bool = False

    def __post_init__(self) -> None:
        for name in ("t", "h", "w", "stride", "clamp"):  # lists too; a mask is a key of what is computed from it
            if not isinstance(getattr(self, name), tuple):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, (low, high), clamped in zip("thw", (self.t, self.h, self.w), self.clamp, strict=True):
            if not all(bound is None or isinstance(bound, int) for bound in (low, high)):
                raise TypeError(f"{name}: interval ({low}, {high}); its bounds must be integers or None")
            if low is not None and high is not None and low > high:
                raise ValueError(f"{name}: interval ({low}, {high}) is empty; lo must not exceed hi")
            if clamped and (low is None or high is None):
                raise ValueError(f"clamp: axis {name} has the interval ({low}, {high}); it needs two finite bounds")
            if clamped and (low > 0 or high < 0):
                raise ValueError(f"clamp: axis {name} has the interval ({low}, {high}); it must contain 0")
        if len(self.stride) != 3 or min(self.stride) < 1:
            raise ValueError(f"stride: {self.stride}; it must be three positive integers (t, h, w)")

    @staticmethod
    def full() -> "SpacetimeMask":
        """Every token of the segment."""
        return SpacetimeMask()

    @staticmethod
    def frame_causal() -> "SpacetimeMask":
        """The query's own frame and all earlier ones."""
        return SpacetimeMask(t=(None, 0))

    @staticmethod
    def spatial() -> "SpacetimeMask":
        """The query's own frame only."""
        return SpacetimeMask(t=(0, 0))

    @staticmethod
    def temporal() -> "SpacetimeMask":
        """The query's own place in every frame."""
        return SpacetimeMask(h=(0, 0), w=(0, 0))

    @staticmethod
    def window(
        t: int | None,
        h: int | None,
        w: int | None,
        *,
        causal: bool = False,
        stride: tuple[int, int, int] = (1, 1, 1),
        clamp: bool = False,
    ) -> "SpacetimeMask":
        """A box of radii t, h, w around the query (None: unbounded); `causal` cuts off what lies in the future.

        A causal window is never clamped along time (that would look ahead), and its time stride must be 1.
        """
        for name, radius in zip("thw", (t, h, w), strict=True):
            if radius is not None and radius < 0:
                raise ValueError(f"{name}: radius {radius}; it must be ≥ 0, or None for unbounded")
        if causal and stride[0] != 1:
            raise ValueError(f"stride: {stride} with causal=True would see the future; its first number must be 1")
        around = [UNBOUNDED if radius is None else (-radius, radius) for radius in (t, h, w)]
        if causal:
            around[0] = (around[0][0], 0)
        clamped = tuple(clamp and None not in interval for interval in around)
        return SpacetimeMask(*around, stride=stride, clamp=(clamped[0] and not causal, *clamped[1:]))

    @staticmethod
    def token_causal() -> "SpacetimeMask":
        """Tokens that do not come after the query in raster order (t, then h, then w)."""
        return SpacetimeMask(t=(None, 0), causal_tokens=True)

    @property
    def is_full(self) -> bool:
        """True if the mask forbids nothing inside a segment."""
        return self.t == self.h == self.w == UNBOUNDED and not self.causal_tokens

    @property
    def sees_past(self) -> bool:
        """True if a query sees all frames up to its own, or all tokens up to itself, and no others."""
        unlimited = (None, 0), *([UNBOUNDED] if self.causal_tokens else [])
        return self.t in unlimited and self.h == self.w == UNBOUNDED and self.stride[0] == 1

    def interval(self, axis: int) -> Interval:
        """The interval of t, h or w. What lies beyond every coordinate is as good as no bound, and stays in int32."""
        low, high = (self.t, self.h, self.w)[axis]
        return tuple(bound if bound is None else max(-_FAR, min(bound, _FAR)) for bound in (low, high))

    def axis_bounds(self, axis: int, coords: Any, extent: Any) -> tuple[Any, Any]:
        """First and last key coordinate (inclusive, not cut to the grid) that queries at `coords` may attend.

        Works on numpy arrays and on tensors alike. axis: 0, 1, 2 for t, h, w; extent: the grid's size along it.
        """
        low, high = self.interval(axis)
        stride = self.stride[axis]
        anchor = coords if stride == 1 else coords // stride * stride + (stride - 1) // 2
        if self.clamp[axis]:
            smaller, larger = (torch.minimum, torch.maximum) if isinstance(coords, Tensor) else (np.minimum, np.maximum)
            floor = anchor * 0 - low
            # The upper limit comes last: a window larger than the grid then still covers all of it.
            anchor = smaller(larger(anchor, floor), anchor * 0 + (extent - 1 - high))
        first = anchor * 0 - _FAR if low is None else anchor + low
        last = anchor * 0 + _FAR if high is None else anchor + high
        return first, last

    def bounds(self, layout: Tokens) -> tuple[Tensor, Tensor]:
        """`axis_bounds` of every token of the layout: two int32 tensors [N, 3]. Padding has arbitrary values."""
        extents = layout.grids[layout.segment_ids.clamp(min=0).long()]
        pairs = [self.axis_bounds(axis, layout.coords[:, axis], extents[:, axis]) for axis in range(3)]
        first, last = (torch.stack(bounds, dim=1) for bounds in zip(*pairs, strict=True))
        if layout.is_joint:
            unplaced = (layout.raster_index < 0)[:, None]
            first, last = first.masked_fill(unplaced, -_FAR), last.masked_fill(unplaced, _FAR)
        return first, last

    def pairs(self, grid: tuple[int, int, int]) -> int:
        """How many (query, key) pairs the mask allows in a segment of that grid (T, H, W): a box counts axis by axis.

        "Not after, in raster order" is: earlier in the first axis in which they differ.
        """
        inside, before, same = zip(*(self._axis_pairs(axis, extent) for axis, extent in enumerate(grid)), strict=True)
        if not self.causal_tokens:
            return inside[0] * inside[1] * inside[2]
        return before[0] * inside[1] * inside[2] + same[0] * (before[1] * inside[2] + same[1] * (before[2] + same[2]))

    def _axis_pairs(self, axis: int, extent: int) -> tuple[int, int, int]:
        """Pairs of coordinates along an axis that the interval allows: all, key first, equal."""
        coords = np.arange(extent)
        first, last = (bound[:, None] for bound in self.axis_bounds(axis, coords, extent))
        inside = (coords >= first) & (coords <= last)
        return int(inside.sum()), int(np.tril(inside, -1).sum()), int(np.trace(inside))

    def materialize(self, layout: Tokens, kv_layout: Tokens | None = None) -> Tensor:
        """The dense boolean matrix [N, Nk], query by key; for tests and pictures only. kv_layout: of the keys."""
        keys = kv_layout or layout
        segments = layout.segment_ids
        raster, key_raster = layout.raster_index[:, None], keys.raster_index[None, :]
        seen = torch.ones_like(raster <= key_raster)
        first, last = self.bounds(layout)
        for axis in range(3):
            places = keys.coords[None, :, axis]
            seen &= (places >= first[:, axis, None]) & (places <= last[:, axis, None])
        if self.causal_tokens:
            seen &= key_raster <= raster
        seen |= (raster < 0) | (key_raster < 0)
        return seen & (segments[:, None] == keys.segment_ids[None, :]) & (segments >= 0)[:, None]
