"""qk_norm_rope: RMSNorm of every head of the queries and keys, then rotation by the token's place in space and time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sora_fast.ops._checks import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_eps,
    check_layout,
    check_shape,
    once,
    value,
)
from sora_fast.ops._dispatch import choose
from sora_fast.ops._modulation import offered, widened
from sora_fast.ops._norm import contiguous
from sora_fast.ops._op import kernels, op
from sora_fast.packing import PackedLayout


@value
@dataclass(frozen=True)
class Rope3D:
    """Rotary positions (arXiv:2104.09864) of three axes: each owns a part of the head's channel pairs.

    split: channels of the axes (t, h, w), even, together the head dim; None: h and w get 2·(D // 6) each and t the
        rest, as in Wan 2.1 (44, 42, 42 of 128).
    theta: pair i of an axis with d channels turns by coord · scale · theta^(−2i/d) radians.
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
    theta: float = 10000.0
    interleaved: bool = True
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scaling: str = "linear"
    extent: tuple[float | None, float | None, float | None] | None = None

    def __post_init__(self) -> None:
        for name in ("split", "scale", "extent"):  # lists too; a rope is a key of what is computed from it
            given = getattr(self, name)
            object.__setattr__(self, name, tuple(given) if isinstance(given, list | np.ndarray) else given)
        if self.split is not None and not (
            len(self.split) == 3 and all(isinstance(n, int | np.integer) and n >= 0 and n % 2 == 0 for n in self.split)
        ):
            raise ValueError(f"split: {self.split}; it must be three even sizes (t, h, w) ≥ 0")
        if not 0 < self.theta < math.inf:
            raise ValueError(f"theta: {self.theta}; it must be positive and finite")
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

        segment_ids [N], coords [N, 3], grids [S, 3]: of a `PackedLayout`. segment_scale: as `qk_norm_rope` takes it.
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
            frequency = factor[:, None] ** share * self.theta ** (-2 * pairs / max(size, 1))
            if self.extent is not None and self.extent[axis] is not None:
                frequency = frequency * (self.extent[axis] / grids[:, axis, None].clamp(min=1).double())
            parts.append(frequency)
        return torch.cat(parts, dim=1)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    layout: PackedLayout,
    rope: Rope3D | None,
    *,
    segment_scale: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate the queries and keys of every head.

    q: [N, H, D], k: [N, Hk, D], D even, of any strides: slices of a fused QKV projection as they are. H is a multiple
        of Hk (grouped queries).
    q_weight, k_weight: [D] of RMSNorm over the head; None: no norm. rope: None: no rotation.
    segment_scale: [S, 3] fp32, factors (t, h, w) of every segment beside those of `rope.scale`, for videos of all sizes
        in one pack; above 0 for NTK-aware scaling (not checked: that would wait for the device).
    Returns (q', k'), of the same shapes, in the dtype of q; computed in fp32; zeros for padding.
    Differentiable in q, k and both weights.
    """
    _check(q, k, q_weight, k_weight, layout, rope, eps)
    if segment_scale is not None:
        _check_segment_scale(segment_scale, layout, rope)
    rotation = (_rotation if torch.compiler.is_compiling() else _kept_rotation)(rope, q.shape[2])
    grids = layout.grids if any(rotation.extent) else None
    if choose("qk_norm_rope", backend, q.device, offered(q), q.dtype) == "torch":
        places = (layout.segment_ids, layout.coords, layout.grids, segment_scale)
        turns = None if rope is None else _turns(*places, *rotation)
        shared = (layout.segment_ids, turns, rotation.interleaved, eps)
        return _NormRope.apply(q, q_weight, *shared), _NormRope.apply(k, k_weight, *shared)
    places = layout.segment_ids.contiguous(), layout.coords.contiguous(), contiguous(grids), contiguous(segment_scale)
    return _qk_norm_rope(q, k, q_weight, k_weight, *places, *rotation, eps)


class _NormRope(torch.autograd.Function):
    """The torch backend for x [N, H, D]. turns [2, N, D/2]: cosines and sines; None: no rotation.

    Padding is taken out of what is written, and of the weight's sums: a mask on what is read kept Inductor from
    vectorising, which took 3 to 6× as long on a CPU. Its own derivative of this backward pass is up to 1.8× slower.
    Only arguments are saved: what is made of them would be a constant to the derivative of the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        segment_ids: Tensor,
        turns: Tensor | None,
        interleaved: bool,
        eps: float,
    ) -> Tensor:
        y = widened(x)
        if weight is not None:
            y = y * _rstd(y, eps) * widened(weight)
        ctx.save_for_backward(x, weight, segment_ids, turns)
        ctx.interleaved, ctx.eps = interleaved, eps
        return _turned(y, turns, interleaved, (segment_ids >= 0)[:, None, None]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, segment_ids, turns = ctx.saved_tensors
        used = segment_ids >= 0
        g, d_weight = _turned(widened(grad), turns, ctx.interleaved, back=True), None
        if weight is not None:
            wide = widened(x)
            rstd = _rstd(wide, ctx.eps)
            normed = wide * rstd
            # In fp64: Inductor adds token after token, and in fp32 would lose a digit over 8,000 of them.
            own = torch.where(used[:, None], (g * normed).sum(dim=1), 0)
            d_weight = own.sum(dim=0, dtype=torch.float64).to(weight.dtype)
            g = g * widened(weight)
            g = rstd * (g - normed * (g * normed).mean(dim=-1, keepdim=True))
        return torch.where(used[:, None, None], g, 0).to(x.dtype), d_weight, *[None] * 4


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _turned(
    x: Tensor, turns: Tensor | None, interleaved: bool, used: Tensor | None = None, *, back: bool = False
) -> Tensor:
    """x [N, H, D] rotated, or rotated back; zeros where not `used`."""
    if turns is None:
        return x if used is None else torch.where(used, x, 0)
    cos, sin = turns[:, :, None]
    sin = -sin if back else sin
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    turned = (a * cos - b * sin, a * sin + b * cos)
    if used is not None:
        turned = tuple(torch.where(used, half, 0) for half in turned)
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


class _Rotation(NamedTuple):
    """A `Rope3D` as custom ops take it; empty lists: no rotation. extent: 0 for an axis without one."""

    split: list[int]
    theta: float
    scale: list[float]
    extent: list[float]
    ntk: bool
    interleaved: bool


def _rotation(rope: Rope3D | None, head_dim: int) -> _Rotation:
    if rope is None:
        return _Rotation([], 1.0, [], [], False, False)
    scale, extent = ([float(x or 0) for x in values] for values in (rope.scale, rope.extent or (0, 0, 0)))
    split = list(rope.split_for(head_dim))
    return _Rotation(split, float(rope.theta), scale, extent, rope.scaling == "ntk", rope.interleaved)


_kept_rotation = lru_cache(_rotation)


@lru_cache
def _kernel_rotation(
    split: tuple[int, ...],
    theta: float,
    scale: tuple[float, ...],
    extent: tuple[float, ...],
    ntk: bool,
    interleaved: bool,
    scaled: bool,
) -> Any:
    """The kernels' own form: some logarithms, 7 µs."""
    options = list(split), theta, list(scale), list(extent), ntk, interleaved
    return kernels("qk_norm_rope").Rotation.of(*options, scaled=scaled)


def _steps(coords: Tensor, split: Sequence[int]) -> Tensor:
    """[N, D/2]: the coordinate that every channel pair turns by."""
    return torch.cat([coords[:, axis, None].expand(-1, size // 2) for axis, size in enumerate(split)], dim=1)


@lru_cache
def _common_frequencies(rope: Rope3D, head_dim: int) -> Tensor:
    """Radians [1, D/2] fp32 on the CPU that every segment has for a step. Kept: they take some thirty small ops, which
    were a quarter of the forward pass over 2,000 tokens."""
    return rope._frequencies(head_dim, torch.ones(1, 3, dtype=torch.float32, device="cpu"), None).float()


@op("sora_fast::rope_turns")
def _turns(
    segment_ids: Tensor,
    coords: Tensor,
    grids: Tensor,
    segment_scale: Tensor | None,
    split: list[int],
    theta: float,
    scale: list[float],
    extent: list[float],
    ntk: bool,
    interleaved: bool,
) -> Tensor:
    """Cosine and sine, [2, N, D/2] fp32. An op of its own, or else Inductor computes them again for every head of the
    queries and the keys, and once more in the backward pass."""
    sides = tuple(side or None for side in extent)
    rope = Rope3D(tuple(split), theta, interleaved, tuple(scale), "ntk" if ntk else "linear", sides)
    if segment_scale is None and not any(extent) and coords.device.type == "cpu":
        angles = _steps(coords, split) * _common_frequencies(rope, sum(split))
    else:
        angles = rope.angles(sum(split), segment_ids, coords, grids, segment_scale)
    turns = angles.new_empty(2, *angles.shape)
    torch.cos(angles, out=turns[0])
    torch.sin(angles, out=turns[1])
    return turns


@_turns.register_fake
def _(segment_ids: Tensor, coords: Tensor, grids: Tensor, scale: Tensor | None, split: list[int], *_: Any) -> Tensor:
    return coords.new_empty(2, coords.shape[0], sum(split) // 2, dtype=torch.float32)


@op("sora_fast::qk_norm_rope")
def _qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    segment_ids: Tensor,
    coords: Tensor,
    grids: Tensor | None,
    segment_scale: Tensor | None,
    split: list[int],
    theta: float,
    scale: list[float],
    extent: list[float],
    ntk: bool,
    interleaved: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    own = kernels("qk_norm_rope")
    places = own.Places.of(coords, grids, segment_scale)
    options = tuple(split), theta, tuple(scale), tuple(extent), ntk, interleaved
    rotation = _kernel_rotation(*options, segment_scale is not None)
    return own.forward(own.Heads(q, k, q_weight, k_weight), segment_ids, places, rotation, eps)


@op("sora_fast::qk_norm_rope_backward")
def _qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    segment_ids: Tensor,
    coords: Tensor,
    grids: Tensor | None,
    segment_scale: Tensor | None,
    split: list[int],
    theta: float,
    scale: list[float],
    extent: list[float],
    ntk: bool,
    interleaved: bool,
    eps: float,
    weights: bool,  # whether anybody asks for the weights' gradients
) -> tuple[Tensor, Tensor, Tensor]:
    own = kernels("qk_norm_rope")
    heads = own.Heads(q, k, q_weight, k_weight)
    places = own.Places.of(coords, grids, segment_scale)
    options = tuple(split), theta, tuple(scale), tuple(extent), ntk, interleaved
    rotation = _kernel_rotation(*options, segment_scale is not None)
    return own.backward((dq, dk), heads, segment_ids, places, rotation, eps, weights=weights)


@_qk_norm_rope.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_qk_norm_rope_backward.register_fake
def _(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), q.new_empty((2 * rest[-1], q.shape[2]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.rotation = inputs[8:]


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[2:4]
    dq, dk, sums = _qk_norm_rope_backward(dq, dk, *ctx.saved_tensors, *ctx.rotation, any(needed))
    weights = ctx.saved_tensors[2:4]
    d_weights = (sums[place].to(weights[place].dtype) if needed[place] else None for place in range(2))
    return dq, dk, *d_weights, *[None] * 11


_qk_norm_rope.register_autograd(_backward, setup_context=_save)


@once
def _check(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    layout: PackedLayout,
    rope: Rope3D | None,
    eps: float,
) -> None:
    check_layout(layout)
    if rope is not None and not isinstance(rope, Rope3D):
        raise TypeError(f"rope: {type(rope).__name__}; it must be a Rope3D or None")
    check_shape("q", q, [layout.capacity, "H", "D"])
    if q.shape[2] % 2 or q.shape[2] == 0:
        raise ValueError(f"q: head dim {q.shape[2]}; it must be even")
    check_shape("k", k, [layout.capacity, "Hk", q.shape[2]])
    if q.shape[1] != k.shape[1] and (0 in (q.shape[1], k.shape[1]) or q.shape[1] % k.shape[1]):
        raise ValueError(f"k: {k.shape[1]} heads; they must divide the {q.shape[1]} of q")
    check_dtype("q", q, FLOAT_DTYPES)
    check_dtype("k", k, [q.dtype])
    check_device("q", q, "the layout", layout.device)
    check_device("k", k, "q", q.device)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_shape(name, weight, q.shape[2:])
            check_dtype(name, weight, FLOAT_DTYPES)
            check_device(name, weight, "q", q.device)
    if rope is not None:
        rope.split_for(q.shape[2])
    check_eps(eps)


def _check_segment_scale(scale: Tensor, layout: PackedLayout, rope: Rope3D | None) -> None:
    if rope is None:
        raise ValueError("segment_scale: given without a rope; it must be None, since nothing turns")
    check_shape("segment_scale", scale, [layout.max_segments, 3])
    check_dtype("segment_scale", scale, [torch.float32])
    check_device("segment_scale", scale, "the layout", layout.device)
    if scale.requires_grad:
        raise ValueError("segment_scale: requires a gradient; it must be detached, since it gets none")
