"""Rotary positions of three axes: what they are made from, and the turns that follow for the torch backend."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sora_fast.ops._checks import value
from sora_fast.ops._op import op


@value
@dataclass(frozen=True)
class Rope3D:
    """Rotary positions (arXiv:2104.09864) of three axes: each owns a part of the head's channel pairs.

    split: channels of the axes (t, h, w), even, together the head dim; None: h and w get 2·(D // 6) each and t the
        rest, as in Wan 2.1 (44, 42, 42 of 128).
    theta: pair i of an axis with d channels turns by coord · scale · theta^(−2i/d) radians; one for all axes, or three.
    interleaved: a pair is the channels (2p, 2p+1), or else (p, p + D/2) of the whole head.
    scale: how much faster than that the pairs of an axis turn, one factor an axis.
    scaling: "linear": so much faster all of them, as above (position interpolation, arXiv:2306.15595); "ntk": the first
        not at all, the last by the whole factor and pair i by scale^(2i/(d−2)), which is theta · scale^(−d/(d−2)) in
        place of theta (NTK-aware scaling, arXiv:2309.00071, Sec. 3.1).
    extent: what the coordinates of an axis grow to over a side of the segment, coord · extent / side, so that sizes
        never seen in training stay inside the trained range (fractional positions, arXiv:2307.06304); None for an
        axis, or for all: a token is a step.
    """

    split: tuple[int, int, int] | None = None
    theta: float | tuple[float, float, float] = 10000.0
    interleaved: bool = True
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scaling: str = "linear"
    extent: tuple[float | None, float | None, float | None] | None = None

    def __post_init__(self) -> None:
        for name in ("split", "theta", "scale", "extent"):  # lists too; a rope is a key of what is computed from it
            given = getattr(self, name)
            object.__setattr__(self, name, tuple(given) if isinstance(given, list | np.ndarray) else given)
        if self.split is not None and not (
            len(self.split) == 3 and all(isinstance(n, int | np.integer) and n >= 0 and n % 2 == 0 for n in self.split)
        ):
            raise ValueError(f"split: {self.split}; it must be three even sizes (t, h, w) ≥ 0")
        if len(self.thetas) != 3 or not all(0 < theta < math.inf for theta in self.thetas):
            raise ValueError(f"theta: {self.theta}; it must be positive and finite, one number or three (t, h, w)")
        if self.scaling not in ("linear", "ntk"):
            raise ValueError(f'scaling: {self.scaling!r}; it must be "linear" or "ntk"')
        least = 0 if self.scaling == "ntk" else -math.inf
        if len(self.scale) != 3 or not all(least < factor < math.inf for factor in self.scale):
            positive = " above 0" * (self.scaling == "ntk")
            raise ValueError(f"scale: {self.scale}; it must be three finite factors (t, h, w){positive}")
        if self.extent is not None and (
            len(self.extent) != 3 or not all(side is None or 0 < side < math.inf for side in self.extent)
        ):
            raise ValueError(f"extent: {self.extent}; it must be three finite lengths (t, h, w) above 0, or None")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Kept: every call asks twice. Of numbers alone, so that it is the same where a pickle is read."""
        return hash((self.split or (), self.thetas, self.scale, self.scaling == "ntk", self.interleaved))

    @property
    def thetas(self) -> tuple[float, float, float]:
        """One an axis (t, h, w)."""
        return self.theta if isinstance(self.theta, tuple) else (self.theta,) * 3

    def split_for(self, head_dim: int) -> tuple[int, int, int]:
        """Channels of the axes (t, h, w) in a head of `head_dim`. Raises ValueError if they do not add up to it."""
        side = 2 * (head_dim // 6)
        split = (head_dim - 2 * side, side, side) if self.split is None else self.split
        if sum(split) != head_dim:
            raise ValueError(f"rope.split: {split} has {sum(split)} channels, but the head dim is {head_dim}")
        return split

    def angles(
        self, head_dim: int, segment_ids: Tensor, coords: Tensor, grids: Tensor, segment_scale: Tensor | None = None
    ) -> Tensor:
        """Radians [N, D/2] fp32 that every channel pair turns by.

        segment_ids [N], coords [N, 3], grids [S, 3]: of a `PackedLayout`; positions [N, 3] fp32 in place of coords.
        segment_scale: as `qk_norm_rope` takes it.
        """
        frequencies = self._frequencies(head_dim, grids, segment_scale).float()
        return _steps(coords, self.split_for(head_dim)) * frequencies[segment_ids.clamp(min=0)]

    def _frequencies(self, head_dim: int, grids: Tensor, segment_scale: Tensor | None) -> Tensor:
        """Radians [S, D/2] fp64 for a step of the coordinate, in every segment."""
        parts = []
        for axis, size in enumerate(self.split_for(head_dim)):
            pairs = torch.arange(size // 2, dtype=torch.float64, device=grids.device)
            factor = grids.new_full(grids.shape[:1], self.scale[axis], dtype=torch.float64)
            if segment_scale is not None:
                factor = factor * segment_scale[:, axis]
            share = pairs * 2 / max(size - 2, 1) if self.scaling == "ntk" else torch.ones_like(pairs)
            frequency = factor[:, None] ** share * self.thetas[axis] ** (-2 * pairs / max(size, 1))
            if self.extent is not None and self.extent[axis] is not None:
                frequency = frequency * (self.extent[axis] / grids[:, axis, None].clamp(min=1).double())
            parts.append(frequency)
        return torch.cat(parts, dim=1)


@dataclass(frozen=True, eq=False)
class RopeTable:
    """Rotary positions from given tables, in place of a `Rope3D`: learned ones, or those of a model that makes its own.

    cos, sin: [N, D/2] that all heads turn by, or [N, H, D/2] for each its own; fp32 (or fp64 where queries and
        keys are), of any strides. Pair p of a head becomes (a·cos − b·sin, a·sin + b·cos). They may want gradients,
        which are sums in a fixed order, over the queries, the keys and, in the first form, the heads.
    interleaved: a pair is the channels (2p, 2p+1), or else (p, p + D/2).

    Where others turn all H·D channels before they are split into heads, `cos.unflatten(1, (H, −1))` of each pair's
    cosines [N, H·D/2] is the second form. Tables of D columns, each twice, are given as a view: `cos[..., ::2]`, or
    `cos[..., : D // 2]` where the halves repeat.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = True

    @staticmethod
    def of_angles(angles: Tensor, *, interleaved: bool = True) -> "RopeTable":
        """Of radians [N, D/2] or [N, H, D/2], which may want a gradient."""
        return RopeTable(angles.cos(), angles.sin(), interleaved)


class Encoded(NamedTuple):
    """A `Rope3D` as custom ops take it. axes: split, theta, scale and extent, three each (extent: 0 for an axis without
    one), in one list: lists cost an op 1 µs each. Empty: no angle is computed.
    """

    axes: list[float]
    ntk: bool
    interleaved: bool

    @property
    def has_extent(self) -> bool:
        return any(self.axes[9:])


def encoded(rope: Rope3D | None, head_dim: int) -> Encoded:
    """No rope: no rotation."""
    if rope is None:
        return Encoded([], False, False)
    parts = rope.split_for(head_dim), rope.thetas, rope.scale, rope.extent or (0, 0, 0)
    return Encoded([float(x or 0) for part in parts for x in part], rope.scaling == "ntk", rope.interleaved)


encoded_once = lru_cache(encoded)


def split_of(axes: Sequence[float]) -> tuple[int, ...]:
    return tuple(int(size) for size in axes[:3])


def decoded(axes: Sequence[float], ntk: bool, interleaved: bool) -> Rope3D:
    """The rope that `encoded` made this of."""
    theta, scale, extent = tuple(axes[3:6]), tuple(axes[6:9]), tuple(side or None for side in axes[9:])
    return Rope3D(split_of(axes), theta, interleaved, scale, "ntk" if ntk else "linear", extent)


def _steps(coords: Tensor, split: Sequence[int]) -> Tensor:
    """[N, D/2]: the coordinate that every channel pair turns by."""
    return torch.cat([coords[:, axis, None].expand(-1, size // 2) for axis, size in enumerate(split)], dim=1)


@lru_cache
def _common_frequencies(rope: Rope3D, head_dim: int) -> Tensor:
    """Radians [1, D/2] fp32 on the CPU that every segment has for a step. Kept: they take some thirty small ops, which
    were a quarter of the forward pass over 2,000 tokens."""
    return rope._frequencies(head_dim, torch.ones(1, 3, dtype=torch.float32, device="cpu"), None).float()


@op("sora_fast::rope_turns")
def turns(
    segment_ids: Tensor,
    coords: Tensor,
    grids: Tensor,
    segment_scale: Tensor | None,
    axes: list[float],
    ntk: bool,
    interleaved: bool,
) -> Tensor:
    """Cosine and sine, [2, N, D/2] fp32. An op of its own, or else Inductor computes them again for every head of the
    queries and the keys, and once more in the backward pass."""
    rope, split = decoded(axes, ntk, interleaved), split_of(axes)
    if segment_scale is None and rope.extent == (None,) * 3 and coords.device.type == "cpu":
        angles = _steps(coords, split) * _common_frequencies(rope, sum(split))
    else:
        angles = rope.angles(sum(split), segment_ids, coords, grids, segment_scale)
    both = angles.new_empty(2, *angles.shape)
    torch.cos(angles, out=both[0])
    torch.sin(angles, out=both[1])
    return both


@turns.register_fake
def _(segment_ids: Tensor, coords: Tensor, grids: Tensor, scale: Tensor | None, axes: list[float], *_: Any) -> Tensor:
    return coords.new_empty(2, coords.shape[0], sum(split_of(axes)) // 2, dtype=torch.float32)
