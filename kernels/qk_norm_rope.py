"""qk_norm_rope: RMSNorm of every head and its rotation in one pass, queries and keys in one launch."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._attention_operands import Rows
from sora_fast.kernels._fold import fold
from sora_fast.kernels._launch import cdiv, launch, next_power_of_two


@dataclass(frozen=True)
class QkNormRopeConfig:
    """Not measured yet. A program owns some tokens and walks over their heads: sines are computed once for all."""

    # Pairs of channels in a block, heads of several tokens. 8 a thread: 16-byte loads of half-split heads in bf16 (of
    # interleaved ones two; where 16 does not divide the head dim, as it does not 72, half-split loads are shorter).
    # Backward, a thread holds their cosines, sines, gradients, both weights and their sums.
    pairs: int = 512
    num_warps: int = 2


@dataclass(frozen=True)
class Rotation:
    """How pairs of channels turn; a compile-time constant. Tuples hold one entry an axis (t, h, w); all are empty if
    nothing turns.

    ends: pairs before the end of the axis.
    octaves, rests: octaves from one pair to the next slower one: 14 bits of fraction first, so that their product with
        a pair's number is exact, then the rest.
    speeds: radians of the first pair for one step of the coordinate.
    lifts: octaves, in those of the segment's scale, that each pair is faster than the one before; zeros: the scale is
        one of the coordinate.
    extents: length of a side in steps, however many tokens it has; 0: a token is a step.
    scaled: segments have a scale.
    interleaved: a pair is the channels (2p, 2p + 1), or else (p, p + D/2).
    """

    ends: tuple[int, ...] = ()
    octaves: tuple[float, ...] = ()
    rests: tuple[float, ...] = ()
    speeds: tuple[float, ...] = ()
    lifts: tuple[float, ...] = ()
    extents: tuple[float, ...] = ()
    scaled: bool = False
    interleaved: bool = False

    @staticmethod
    def of(
        split: list[int],
        theta: float,
        scale: list[float],
        extent: list[float],
        ntk: bool,
        interleaved: bool,
        *,
        scaled: bool,
    ) -> "Rotation":
        """The fields of a `Rope3D`, spelled out for every axis; empty lists: nothing turns."""
        ends, octaves, lifts = [], [], []
        for size, factor in zip(split, scale, strict=True):
            lift = 2 / max(size - 2, 1) if ntk else 0.0
            ends.append((ends[-1] if ends else 0) + size // 2)
            octaves.append(2 * math.log2(theta) / max(size, 1) - (lift * math.log2(factor) if ntk else 0.0))
            lifts.append(lift)
        coarse = tuple(round(step * 2**14) / 2**14 for step in octaves)
        rests = tuple(exact - part for exact, part in zip(octaves, coarse, strict=True))
        speeds = (1.0,) * len(split) if ntk else tuple(scale)
        return Rotation(tuple(ends), coarse, rests, speeds, tuple(lifts), tuple(extent), scaled, interleaved)


class Heads(NamedTuple):
    """q [N, H, D], k [N, Hk, D] of any strides; weights [D] of their norms, or None."""

    q: Tensor
    k: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None

    @property
    def vectors(self) -> tuple[Any, ...]:
        """Both weights, each with its stride."""
        q, k = self.q_weight, self.k_weight
        return q, 1 if q is None else q.stride(0), k, 1 if k is None else k.stride(0)

    @property
    def counts(self) -> tuple[int, int, int]:
        """N, H, Hk."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1]


class Places(NamedTuple):
    """Where the tokens are: coords [N, 3]; grids [S, 3]; scale [S, 3] fp32 of every segment. All contiguous.

    For grids and a scale that the rotation does not need `coords` stands in: Triton 3.6 lets no tuple hold None.
    """

    coords: Tensor
    grids: Tensor
    scale: Tensor

    @staticmethod
    def of(coords: Tensor, grids: Tensor | None, scale: Tensor | None) -> "Places":
        return Places(coords, coords if grids is None else grids, coords if scale is None else scale)


@dataclass(frozen=True)
class Shape:
    """What is known of the heads when the kernels are compiled.

    dim: channels of a head. pairs: a power of two that covers its pairs. tokens: in a block.
    unit: strides of tokens and heads are passed in units of so many elements. Triton knows of an integer only whether
        16 divides it: passed as it is, a head stride of 72 would cost the 16-byte loads.
    """

    dim: int
    pairs: int
    tokens: int
    unit: int

    @staticmethod
    def of(*tensors: Tensor) -> tuple["Shape", list[Rows]]:
        """For all [N, H, D] that a kernel touches, of any strides; and those as it takes them."""
        shape, steps = _shape(tensors[0].shape[2], tuple([x.stride() for x in tensors]))
        return shape, [Rows(x, *step) for x, step in zip(tensors, steps, strict=True)]

    def programs(self, x: Tensor) -> int:
        """How many it takes to walk over the tokens of x [N, H, D]."""
        return cdiv(x.shape[0], self.tokens)


@lru_cache
def _shape(dim: int, strides: tuple[tuple[int, ...], ...]) -> tuple[Shape, list[tuple[int, ...]]]:
    """And the strides in its units."""
    pairs = next_power_of_two(dim // 2)
    unit = 8 if all(stride % 8 == 0 for token, head, _ in strides for stride in (token, head)) else 1
    shape = Shape(dim, pairs, max(1, QkNormRopeConfig.pairs // pairs), unit)
    return shape, [(token // unit, head // unit, channel) for token, head, channel in strides]


def forward(heads: Heads, segment_ids: Tensor, places: Places, rotation: Rotation, eps: float) -> tuple[Tensor, Tensor]:
    """Normalised and rotated q and k, contiguous; zeros for padding. segment_ids: [N], −1 for padding."""
    tensors = (heads.q, heads.k, *_empty(heads))
    shape, rows = Shape.of(*tensors)
    launch(
        *(qk_norm_rope_forward_kernel, (shape.programs(heads.q),), *rows, *heads.vectors),
        *(segment_ids, places, *heads.counts),
        **{"SHAPE": shape, "ROTATION": rotation, "EPS": eps, "num_warps": QkNormRopeConfig.num_warps},
    )
    return tensors[2:]


def backward(
    grads: tuple[Tensor, Tensor],
    heads: Heads,
    segment_ids: Tensor,
    places: Places,
    rotation: Rotation,
    eps: float,
    *,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and k, contiguous, and of both weights, [2, D] fp32 (zeros for one that is None).

    weights: False: [0, D] in place of the weights' gradients.
    """
    tensors = (*grads, heads.q, heads.k, *_empty(heads))
    shape, rows = Shape.of(*tensors)
    sizes = (shape.programs(heads.q), 2, shape.dim) if weights else (0, shape.dim)
    partials = torch.empty(sizes, dtype=torch.float32, device=heads.q.device)
    launch(
        *(qk_norm_rope_backward_kernel, (shape.programs(heads.q),), *rows, *heads.vectors),
        *(partials if weights else None, segment_ids, places, *heads.counts),
        **{"SHAPE": shape, "ROTATION": rotation, "EPS": eps, "num_warps": QkNormRopeConfig.num_warps},
    )
    return *tensors[4:], fold(partials) if weights else partials


def _empty(heads: Heads) -> tuple[Tensor, Tensor]:
    return heads.q.new_empty(heads.q.shape), heads.k.new_empty(heads.k.shape)


@triton.jit
def qk_norm_rope_forward_kernel(
    q, k, q_out, k_out, q_weight, q_weight_stride, k_weight, k_weight_stride,
    segment_ids, places, num_tokens, q_heads, k_heads,
    SHAPE: tl.constexpr, ROTATION: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * SHAPE.tokens + tl.arange(0, SHAPE.tokens)
    exists = n < num_tokens
    segment = tl.load(segment_ids + n, mask=exists, other=-1)
    used = segment >= 0
    turn = _turns(places, n, segment, SHAPE, ROTATION)
    q_weights = _weights(q_weight, q_weight_stride, SHAPE, ROTATION)
    k_weights = _weights(k_weight, k_weight_stride, SHAPE, ROTATION)
    for head in range(q_heads):
        # Both before either is stored: the compiler must not move a load past a store.
        q_pairs = _load(q, n, head, used, SHAPE, ROTATION)
        k_pairs = _load(k, n, head, used & (head < k_heads), SHAPE, ROTATION)
        q_pairs = _rotate(_norm(q_pairs, q_weight, q_weights, SHAPE, EPS), turn, ROTATION)
        _store(q_out, n, head, exists, q_pairs, SHAPE, ROTATION)
        k_pairs = _rotate(_norm(k_pairs, k_weight, k_weights, SHAPE, EPS), turn, ROTATION)
        _store(k_out, n, head, exists & (head < k_heads), k_pairs, SHAPE, ROTATION)


@triton.jit
def qk_norm_rope_backward_kernel(
    dq, dk, q, k, q_grad, k_grad, q_weight, q_weight_stride, k_weight, k_weight_stride, partials,
    segment_ids, places, num_tokens, q_heads, k_heads,
    SHAPE: tl.constexpr, ROTATION: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * SHAPE.tokens + tl.arange(0, SHAPE.tokens)
    exists = n < num_tokens
    segment = tl.load(segment_ids + n, mask=exists, other=-1)
    used = segment >= 0
    cos, sin = _turns(places, n, segment, SHAPE, ROTATION)
    back = cos, -sin
    q_weights = _weights(q_weight, q_weight_stride, SHAPE, ROTATION)
    k_weights = _weights(k_weight, k_weight_stride, SHAPE, ROTATION)
    q_sums = _zeros(SHAPE)
    k_sums = _zeros(SHAPE)
    for head in range(q_heads):
        k_used = used & (head < k_heads)
        q_grads = _load(dq, n, head, used, SHAPE, ROTATION)
        k_grads = _load(dk, n, head, k_used, SHAPE, ROTATION)
        # Without a norm the gradient does not depend on what was turned.
        q_pairs = q_grads if q_weight is None else _load(q, n, head, used, SHAPE, ROTATION)
        k_pairs = k_grads if k_weight is None else _load(k, n, head, k_used, SHAPE, ROTATION)
        q_grads = _rotate(q_grads, back, ROTATION)
        q_grads, q_sums = _norm_gradient(q_grads, q_pairs, q_sums, q_weight, q_weights, SHAPE, EPS)
        _store(q_grad, n, head, exists, q_grads, SHAPE, ROTATION)
        k_grads = _rotate(k_grads, back, ROTATION)
        k_grads, k_sums = _norm_gradient(k_grads, k_pairs, k_sums, k_weight, k_weights, SHAPE, EPS)
        _store(k_grad, n, head, exists & (head < k_heads), k_grads, SHAPE, ROTATION)
    if partials is not None:
        partials += tl.program_id(0).to(tl.int64) * 2 * SHAPE.dim
        _store_sums(partials, q_sums, SHAPE, ROTATION)
        _store_sums(partials + SHAPE.dim, k_sums, SHAPE, ROTATION)


@triton.jit
def _pairs(SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """The two channels [p] of every pair, and which pairs there are."""
    pair = tl.arange(0, SHAPE.pairs)
    first = 2 * pair if ROTATION.interleaved else pair
    second = first + 1 if ROTATION.interleaved else pair + SHAPE.dim // 2
    return first, second, pair < SHAPE.dim // 2


@triton.jit
def _pointers(x, n, head, channel, SHAPE: tl.constexpr):
    # 64 bits along the head too: stored as [D, H, N], its channels lie far apart.
    start = n.to(tl.int64) * x.token_stride + tl.cast(head, tl.int64) * x.head_stride
    return x.data + (start * SHAPE.unit)[:, None] + (channel.to(tl.int64) * x.dim_stride)[None, :]


@triton.jit
def _load(x, n, head, real, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """Both channels [n, p] of the pairs of a head, fp32; zeros where not `real` [n], whatever stands there."""
    if ROTATION.interleaved:
        # Whole rows, and then taken apart: a thread reads neighbours, and a pair is in its own registers.
        channel = tl.arange(0, 2 * SHAPE.pairs)
        mask = real[:, None] & (channel < SHAPE.dim)[None, :]
        both = tl.load(_pointers(x, n, head, channel, SHAPE), mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(both, [SHAPE.tokens, SHAPE.pairs, 2]))
    else:
        channel, other, held = _pairs(SHAPE, ROTATION)
        mask = real[:, None] & held[None, :]
        first = tl.load(_pointers(x, n, head, channel, SHAPE), mask=mask, other=0.0)
        second = tl.load(_pointers(x, n, head, other, SHAPE), mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store(x, n, head, exists, pairs, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    first, second = pairs[0].to(x.data.dtype.element_ty), pairs[1].to(x.data.dtype.element_ty)
    if ROTATION.interleaved:
        channel = tl.arange(0, 2 * SHAPE.pairs)
        mask = exists[:, None] & (channel < SHAPE.dim)[None, :]
        both = tl.reshape(tl.join(first, second), [SHAPE.tokens, 2 * SHAPE.pairs])
        tl.store(_pointers(x, n, head, channel, SHAPE), both, mask=mask)
    else:
        channel, other, held = _pairs(SHAPE, ROTATION)
        mask = exists[:, None] & held[None, :]
        tl.store(_pointers(x, n, head, channel, SHAPE), first, mask=mask)
        tl.store(_pointers(x, n, head, other, SHAPE), second, mask=mask)


@triton.jit
def _weights(weight, stride, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    if weight is None:
        return 1.0, 1.0
    else:
        first, second, held = _pairs(SHAPE, ROTATION)
        a = tl.load(weight + first.to(tl.int64) * stride, mask=held, other=0.0).to(tl.float32)[None, :]
        b = tl.load(weight + second.to(tl.int64) * stride, mask=held, other=0.0).to(tl.float32)[None, :]
        return a, b


@triton.jit
def _zeros(SHAPE: tl.constexpr):
    tokens: tl.constexpr = SHAPE.tokens
    pairs: tl.constexpr = SHAPE.pairs
    return tl.zeros([tokens, pairs], tl.float32), tl.zeros([tokens, pairs], tl.float32)


@triton.jit
def _store_sums(partials, sums, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    first, second, held = _pairs(SHAPE, ROTATION)
    tl.store(partials + first, tl.sum(sums[0], axis=0), mask=held)
    tl.store(partials + second, tl.sum(sums[1], axis=0), mask=held)


@triton.jit
def _inverse_rms(a, b, SHAPE: tl.constexpr, EPS: tl.constexpr):
    return tl.rsqrt(tl.sum(a * a + b * b, axis=1) / SHAPE.dim + EPS)[:, None]


@triton.jit
def _norm(pairs, weight, weights, SHAPE: tl.constexpr, EPS: tl.constexpr):
    a, b = pairs
    if weight is not None:
        rstd = _inverse_rms(a, b, SHAPE, EPS)
        a, b = a * rstd * weights[0], b * rstd * weights[1]
    return a, b


@triton.jit
def _norm_gradient(grads, pairs, sums, weight, weights, SHAPE: tl.constexpr, EPS: tl.constexpr):
    """Gradients of the pairs before the norm, and the sums for those of its weights, with these added."""
    da, db = grads
    wa, wb = sums
    if weight is not None:
        a, b = pairs
        rstd = _inverse_rms(a, b, SHAPE, EPS)
        a *= rstd
        b *= rstd
        wa += da * a
        wb += db * b
        da *= weights[0]
        db *= weights[1]
        mean = (tl.sum(da * a + db * b, axis=1) / SHAPE.dim)[:, None]
        da, db = (da - a * mean) * rstd, (db - b * mean) * rstd
    return (da, db), (wa, wb)


@triton.jit
def _rotate(pairs, turn, ROTATION: tl.constexpr):
    a, b = pairs
    cos, sin = turn
    if len(ROTATION.ends) > 0:
        a, b = a * cos - b * sin, a * sin + b * cos
    return a, b


@triton.jit
def _turns(places, n, segment, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """Cosine and sine [n, p] of the angle that a token's pair turns by."""
    if len(ROTATION.ends) == 0:
        return 1.0, 0.0
    else:
        t, t_lift = _coordinate(places, n, segment, 0, ROTATION)
        h, h_lift = _coordinate(places, n, segment, 1, ROTATION)
        w, w_lift = _coordinate(places, n, segment, 2, ROTATION)
        pair = tl.arange(0, SHAPE.pairs)
        in_t, in_h = pair < ROTATION.ends[0], pair < ROTATION.ends[1]
        number = (pair - _of_axis(in_t, in_h, 0, ROTATION.ends[0], ROTATION.ends[1])).to(tl.float32)
        octaves = number * _of_axis(in_t, in_h, ROTATION.octaves[0], ROTATION.octaves[1], ROTATION.octaves[2])
        rest = number * _of_axis(in_t, in_h, ROTATION.rests[0], ROTATION.rests[1], ROTATION.rests[2])
        # Whole octaves apart: the rounding of a large exponent would be an error of the angle.
        whole = tl.floor(octaves)
        speed = tl.exp2(-whole) * tl.exp2(whole - octaves - rest)
        in_t, in_h = in_t[None, :], in_h[None, :]
        radians = _of_axis(in_t, in_h, t, h, w) * speed[None, :]
        if ROTATION.scaled and ROTATION.lifts[0] > 0:
            radians *= tl.exp2(number[None, :] * _of_axis(in_t, in_h, t_lift, h_lift, w_lift))
        return _cos_sin(radians)


@triton.jit
def _of_axis(in_t, in_h, t, h, w):
    return tl.where(in_t, t, tl.where(in_h, h, w))


@triton.jit
def _coordinate(places, n, segment, AXIS: tl.constexpr, ROTATION: tl.constexpr):
    """Radians [n, 1] that the first pair of an axis turns by, and the octaves that each further pair is faster by."""
    used = segment >= 0
    step = tl.load(places.coords + n.to(tl.int64) * 3 + AXIS, mask=used, other=0).to(tl.float32)
    step *= ROTATION.speeds[AXIS]
    lift = tl.zeros_like(step)
    if ROTATION.extents[AXIS] != 0:
        side = tl.load(places.grids + segment * 3 + AXIS, mask=used, other=1)
        step *= ROTATION.extents[AXIS] / side
    if ROTATION.scaled:
        scale = tl.load(places.scale + segment * 3 + AXIS, mask=used, other=1.0)
        if ROTATION.lifts[AXIS] > 0:
            lift = tl.log2(scale) * ROTATION.lifts[AXIS]
        else:
            step *= scale
    return step[:, None], lift[:, None]


@triton.jit
def _cos_sin(radians):
    """cos and sin, to one unit in the last place up to some 10⁴ radians.

    tl.sin's own reduction of the range, for any argument, takes a stack in memory. This one takes π/2 off in three
    parts, so short that their multiples are exact (Cody and Waite); then Cephes' polynomials for [−π/4, π/4].
    """
    whole = tl.floor(radians * 0.6366197723675814 + 0.5)
    x = radians - whole * 1.5703125
    x -= whole * 4.837512969970703e-4
    x -= whole * 7.549789948768648e-8
    xx = x * x
    sin = x + x * xx * (-1.6666654611e-1 + xx * (8.3321608736e-3 - xx * 1.9515295891e-4))
    cos = 1 - 0.5 * xx + xx * xx * (4.166664568298827e-2 + xx * (-1.388731625493765e-3 + xx * 2.443315711809948e-5))
    quadrant = whole.to(tl.int32) & 3
    swapped = (quadrant & 1) == 1
    turned_cos = tl.where(swapped, sin, cos)
    turned_sin = tl.where(swapped, cos, sin)
    turned_cos = tl.where((quadrant == 1) | (quadrant == 2), -turned_cos, turned_cos)
    return turned_cos, tl.where(quadrant >= 2, -turned_sin, turned_sin)
