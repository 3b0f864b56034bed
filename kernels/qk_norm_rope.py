"""qk_norm_rope: RMSNorm of every head and its rotation in one pass, queries and keys in one launch."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._fold import fold
from sora_fast.kernels._launch import launch, next_power_of_two


@dataclass(frozen=True)
class QkNormRopeConfig:
    """Not measured yet. A program owns some tokens and walks over their heads: sines are computed once for all.

    Pairs of channels in a block, heads of several tokens: more spill with head dims that are no power of two.
    """

    pairs: int = 512  # 4 a thread, and their cosines and sines; backward, their gradients and sums for the weights'
    num_warps: int = 4


class Rotation(NamedTuple):
    """split: channels of t, h, w; pair i of an axis turns by coord · scale · theta^(−2i / channels). Empty split and
    scale: no rotation."""

    split: tuple[int, ...]
    theta: float
    scale: tuple[float, ...]
    interleaved: bool

    def meta(self) -> dict[str, Any]:
        """Constants of the kernels, one an axis: pairs before its end; octaves from one pair to the next, of which 14
        bits of fraction first, so that their product with a pair's number is exact, then the rest; radians
        of its first pair for one step of the coordinate."""
        ends, octaves, rests, speeds = [], [], [], []
        for size, scale in zip(self.split, self.scale, strict=True):
            exact = 2 * math.log2(self.theta) / max(size, 1)
            coarse = round(exact * 2**14) / 2**14
            ends.append((ends[-1] if ends else 0) + size // 2)
            octaves.append(coarse)
            rests.append(exact - coarse)
            speeds.append(scale)
        tables = {"ENDS": ends, "OCTAVES": octaves, "RESTS": rests, "SPEEDS": speeds}
        return {"INTERLEAVED": self.interleaved, **{name: tuple(values) for name, values in tables.items()}}


class Heads(NamedTuple):
    """q, k [N, H, D] of any strides; weights [D] of their norms, or None."""

    q: Tensor
    k: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None

    @property
    def args(self) -> tuple[Any, ...]:
        return *_strided(self.q), *_strided(self.k), *_vector(self.q_weight), *_vector(self.k_weight)


def _strided(x: Tensor) -> tuple[Any, ...]:
    return x, *x.stride()


def _vector(weight: Tensor | None) -> tuple[Any, ...]:
    return weight, 1 if weight is None else weight.stride(0)


def forward(heads: Heads, segment_ids: Tensor, coords: Tensor, rotation: Rotation, eps: float) -> tuple[Tensor, Tensor]:
    """Normalised and rotated q and k, [N, H, D] contiguous; zeros for padding."""
    config = QkNormRopeConfig()
    num_tokens, num_heads, head_dim = heads.q.shape
    outputs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (heads.q, heads.k))
    block = next_power_of_two(head_dim // 2)
    tokens = max(1, config.pairs // block)
    launch(
        *(_forward, (triton.cdiv(num_tokens, tokens),), *heads.args, *outputs),
        *(segment_ids, coords, num_tokens, num_heads),
        **rotation.meta(),
        D=head_dim,
        EPS=eps,
        BLOCK_N=tokens,
        BLOCK_P=block,
        num_warps=config.num_warps,
    )
    return outputs


def backward(
    grads: tuple[Tensor, Tensor],
    heads: Heads,
    segment_ids: Tensor,
    coords: Tensor,
    rotation: Rotation,
    eps: float,
    *,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and k, [N, H, D] contiguous, and of both weights, [2, D] fp32 (zeros for one that is None).

    weights: False: [0, D] in place of the weights' gradients.
    """
    config = QkNormRopeConfig()
    num_tokens, num_heads, head_dim = heads.q.shape
    results = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (heads.q, heads.k))
    block = next_power_of_two(head_dim // 2)
    tokens = max(1, config.pairs // block)
    programs = triton.cdiv(num_tokens, tokens)
    shape = (programs, 2, head_dim) if weights else (0, head_dim)
    partials = torch.empty(shape, dtype=torch.float32, device=heads.q.device)
    launch(
        *(_backward, (programs,), *_strided(grads[0]), *_strided(grads[1]), *heads.args, *results),
        partials if weights else None,
        *(segment_ids, coords, num_tokens, num_heads),
        **rotation.meta(),
        D=head_dim,
        EPS=eps,
        BLOCK_N=tokens,
        BLOCK_P=block,
        num_warps=config.num_warps,
    )
    return *results, fold(partials) if weights else partials


@triton.jit
def _forward(
    q, q_stride_n, q_stride_h, q_stride_d, k, k_stride_n, k_stride_h, k_stride_d,
    q_weight, q_weight_stride, k_weight, k_weight_stride, q_out, k_out,
    segment_ids, coords, num_tokens, num_heads,
    INTERLEAVED: tl.constexpr, ENDS: tl.constexpr, OCTAVES: tl.constexpr, RESTS: tl.constexpr, SPEEDS: tl.constexpr,
    D: tl.constexpr, EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, second, held = _pairs(INTERLEAVED, D, BLOCK_P)
    used = tl.load(segment_ids + n, mask=n < num_tokens, other=-1) >= 0
    real = used[:, None] & held[None, :]
    written = (n < num_tokens)[:, None] & held[None, :]
    cos, sin = _turns(coords, n, used, ENDS, OCTAVES, RESTS, SPEEDS, BLOCK_P)
    q_weights = _weights(q_weight, q_weight_stride, first, second, held)
    k_weights = _weights(k_weight, k_weight_stride, first, second, held)
    rows = n[:, None].to(tl.int64)
    for head in range(num_heads):
        out = (rows * num_heads + head) * D
        a, b = _load(q, rows, q_stride_n, head, q_stride_h, q_stride_d, first, second, real)
        a, b = _norm(a, b, q_weight, q_weights, D, EPS)
        a, b = _rotate(a, b, cos, sin, ENDS)
        _store(q_out + out, a, b, first, second, written)
        a, b = _load(k, rows, k_stride_n, head, k_stride_h, k_stride_d, first, second, real)
        a, b = _norm(a, b, k_weight, k_weights, D, EPS)
        a, b = _rotate(a, b, cos, sin, ENDS)
        _store(k_out + out, a, b, first, second, written)


@triton.jit
def _backward(
    dq, dq_stride_n, dq_stride_h, dq_stride_d, dk, dk_stride_n, dk_stride_h, dk_stride_d,
    q, q_stride_n, q_stride_h, q_stride_d, k, k_stride_n, k_stride_h, k_stride_d,
    q_weight, q_weight_stride, k_weight, k_weight_stride, q_grad, k_grad, partials,
    segment_ids, coords, num_tokens, num_heads,
    INTERLEAVED: tl.constexpr, ENDS: tl.constexpr, OCTAVES: tl.constexpr, RESTS: tl.constexpr, SPEEDS: tl.constexpr,
    D: tl.constexpr, EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, second, held = _pairs(INTERLEAVED, D, BLOCK_P)
    used = tl.load(segment_ids + n, mask=n < num_tokens, other=-1) >= 0
    real = used[:, None] & held[None, :]
    written = (n < num_tokens)[:, None] & held[None, :]
    cos, sin = _turns(coords, n, used, ENDS, OCTAVES, RESTS, SPEEDS, BLOCK_P)
    q_weights = _weights(q_weight, q_weight_stride, first, second, held)
    k_weights = _weights(k_weight, k_weight_stride, first, second, held)
    rows = n[:, None].to(tl.int64)
    q_sum_a = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    q_sum_b, k_sum_a, k_sum_b = q_sum_a, q_sum_a, q_sum_a
    for head in range(num_heads):
        out = (rows * num_heads + head) * D
        da, db = _load(dq, rows, dq_stride_n, head, dq_stride_h, dq_stride_d, first, second, real)
        da, db = _rotate(da, db, cos, -sin, ENDS)
        if q_weight is not None:
            a, b = _load(q, rows, q_stride_n, head, q_stride_h, q_stride_d, first, second, real)
            da, db, wa, wb = _norm_gradient(da, db, a, b, q_weights, D, EPS)
            q_sum_a += wa
            q_sum_b += wb
        _store(q_grad + out, da, db, first, second, written)
        da, db = _load(dk, rows, dk_stride_n, head, dk_stride_h, dk_stride_d, first, second, real)
        da, db = _rotate(da, db, cos, -sin, ENDS)
        if k_weight is not None:
            a, b = _load(k, rows, k_stride_n, head, k_stride_h, k_stride_d, first, second, real)
            da, db, wa, wb = _norm_gradient(da, db, a, b, k_weights, D, EPS)
            k_sum_a += wa
            k_sum_b += wb
        _store(k_grad + out, da, db, first, second, written)
    if partials is not None:
        partials += tl.program_id(0).to(tl.int64) * 2 * D
        tl.store(partials + first, tl.sum(q_sum_a, axis=0), mask=held)
        tl.store(partials + second, tl.sum(q_sum_b, axis=0), mask=held)
        tl.store(partials + D + first, tl.sum(k_sum_a, axis=0), mask=held)
        tl.store(partials + D + second, tl.sum(k_sum_b, axis=0), mask=held)


@triton.jit
def _pairs(INTERLEAVED: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr):
    """The two channels [p] of every pair, and which pairs there are."""
    pair = tl.arange(0, BLOCK_P)
    held = pair < D // 2
    return (2 * pair, 2 * pair + 1, held) if INTERLEAVED else (pair, pair + D // 2, held)


@triton.jit
def _load(x, rows, stride_n, head, stride_h, stride_d, first, second, real):
    x += rows * stride_n + tl.cast(head, tl.int64) * stride_h
    # 64 bits along the head too: stored as [D, H, N], its channels lie far apart.
    first, second = first.to(tl.int64), second.to(tl.int64)
    a = tl.load(x + first[None, :] * stride_d, mask=real, other=0.0).to(tl.float32)
    b = tl.load(x + second[None, :] * stride_d, mask=real, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store(out, a, b, first, second, written):
    tl.store(out + first[None, :], a.to(out.dtype.element_ty), mask=written)
    tl.store(out + second[None, :], b.to(out.dtype.element_ty), mask=written)


@triton.jit
def _weights(weight, stride, first, second, held):
    if weight is None:
        return 0.0, 0.0
    else:
        a = tl.load(weight + first * stride, mask=held, other=0.0).to(tl.float32)[None, :]
        b = tl.load(weight + second * stride, mask=held, other=0.0).to(tl.float32)[None, :]
        return a, b


@triton.jit
def _norm(a, b, weight, weights, D: tl.constexpr, EPS: tl.constexpr):
    if weight is None:
        return a, b
    else:
        rstd = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / D + EPS)[:, None]
        return a * rstd * weights[0], b * rstd * weights[1]


@triton.jit
def _norm_gradient(da, db, a, b, weights, D: tl.constexpr, EPS: tl.constexpr):
    """Gradients of the pair before the norm, and of its weights."""
    rstd = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / D + EPS)[:, None]
    a *= rstd
    b *= rstd
    wa, wb = da * a, db * b
    da *= weights[0]
    db *= weights[1]
    mean = (tl.sum(da * a + db * b, axis=1) / D)[:, None]
    return (da - a * mean) * rstd, (db - b * mean) * rstd, wa, wb


@triton.jit
def _rotate(a, b, cos, sin, ENDS: tl.constexpr):
    if len(ENDS) == 0:
        return a, b
    else:
        return a * cos - b * sin, a * sin + b * cos


@triton.jit
def _turns(
    coords, n, used,
    ENDS: tl.constexpr, OCTAVES: tl.constexpr, RESTS: tl.constexpr, SPEEDS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Cosine and sine [n, p] of the angle that a token's pair turns by."""
    if len(ENDS) == 0:
        return 1.0, 0.0
    else:
        place = coords + n.to(tl.int64) * 3
        t = tl.load(place, mask=used, other=0)[:, None]
        h = tl.load(place + 1, mask=used, other=0)[:, None]
        w = tl.load(place + 2, mask=used, other=0)[:, None]
        pair = tl.arange(0, BLOCK_P)
        in_t, in_h = pair < ENDS[0], pair < ENDS[1]
        number = (pair - tl.where(in_t, 0, tl.where(in_h, ENDS[0], ENDS[1]))).to(tl.float32)
        octaves = number * tl.where(in_t, OCTAVES[0], tl.where(in_h, OCTAVES[1], OCTAVES[2]))
        rest = number * tl.where(in_t, RESTS[0], tl.where(in_h, RESTS[1], RESTS[2]))
        # Whole octaves apart: the rounding of a large exponent would be an error of the angle.
        whole = tl.floor(octaves)
        slowing = tl.exp2(-whole) * tl.exp2(whole - octaves - rest)
        speed = slowing * tl.where(in_t, SPEEDS[0], tl.where(in_h, SPEEDS[1], SPEEDS[2]))
        coord = tl.where(in_t[None, :], t, tl.where(in_h[None, :], h, w)).to(tl.float32)
        return _cos_sin(coord * speed[None, :])


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
