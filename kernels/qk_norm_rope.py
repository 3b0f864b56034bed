"""qk_norm_rope: the norm of every head and its rotation in one pass, queries and keys in one launch."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels import _qk_norm_rope_together as together
from sora_fast.kernels._fold import fold
from sora_fast.kernels._heads import Heads, Shape, add, load, norm_gradient, norm_pairs, pair_channels, store, zeros
from sora_fast.kernels._launch import launch
from sora_fast.kernels._rotation import Turning, back, back_of, rotate, shared_turn, store_turn, turn_gradient, turn_of


@dataclass(frozen=True)
class QkNormRopeConfig:
    """Not measured yet. A program owns some tokens and walks over their heads: sines are computed once for all."""

    # Pairs of channels in a block, heads of several tokens. 8 a thread: 16-byte loads of half-split heads in bf16 (of
    # interleaved ones two; where 16 does not divide the head dim, as it does not 72, half-split loads are shorter).
    # Backward, a thread holds their cosines, sines, gradients, both weights and their sums.
    pairs: int = 512
    num_warps: int = 2


def forward(heads: Heads, segment_ids: Tensor, turning: Turning, norm: str, eps: float) -> tuple[Tensor, Tensor | None]:
    """Normed and rotated q and k, contiguous; zeros for padding. segment_ids: [N], −1 for padding. norm: as the op
    takes it."""
    if norm == "rms_across_heads" and heads.is_normed:
        return together.forward(heads, segment_ids, turning, eps)
    outputs = heads.empty()
    shape, rows = Shape.of(heads.q, heads.k, *outputs, pairs=QkNormRopeConfig.pairs)
    launch(
        *(qk_norm_rope_forward_kernel, (shape.programs(heads.q),), *rows, *heads.vectors),
        *(segment_ids, turning.places, turning.cos, turning.sin, *heads.counts),
        **{"SHAPE": shape, "ROTATION": turning.rotation, "NORM": heads.norm, "EPS": eps},
        num_warps=QkNormRopeConfig.num_warps,
    )
    return outputs


def backward(
    grads: tuple[Tensor, Tensor | None],
    heads: Heads,
    segment_ids: Tensor,
    turning: Turning,
    norm: str,
    eps: float,
    *,
    sums: bool,
    d_tables: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of q and k, contiguous, and of the vectors, [`Heads.sums`, D] fp32 (for one that is None, of no
    meaning); of those over all heads [`Heads.sums`, H, D].

    sums: False: none in place of the vectors' gradients. d_tables: [2, N, H or 1, D/2] fp32, contiguous: where the
    gradients of the cosines and sines go, if anybody asks for them.
    """
    if norm == "rms_across_heads" and heads.is_normed:
        options = {"sums": sums, "d_tables": d_tables}
        return together.backward(grads, heads, segment_ids, turning, eps, **options)
    outputs = heads.empty()
    shape, rows = Shape.of(*grads, heads.q, heads.k, *outputs, pairs=QkNormRopeConfig.pairs)
    sizes = (shape.programs(heads.q), heads.sums, shape.dim) if sums else (0, shape.dim)
    partials = torch.empty(sizes, dtype=torch.float32, device=heads.q.device)
    launch(
        *(qk_norm_rope_backward_kernel, (shape.programs(heads.q),), *rows, *heads.vectors, partials if sums else None),
        *(segment_ids, turning.places, turning.cos, turning.sin, *turning.gradients(d_tables), *heads.counts),
        **{"SHAPE": shape, "ROTATION": turning.rotation, "NORM": heads.norm, "EPS": eps},
        num_warps=QkNormRopeConfig.num_warps,
    )
    return *outputs, fold(partials) if sums else partials


@triton.jit
def qk_norm_rope_forward_kernel(
    q, k, q_out, k_out, q_weight, q_weight_stride, k_weight, k_weight_stride, q_bias, k_bias,
    segment_ids, places, cos, sin, num_tokens, q_heads, k_heads,
    SHAPE: tl.constexpr, ROTATION: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * SHAPE.rows + tl.arange(0, SHAPE.rows)
    exists = n < num_tokens
    segment = tl.load(segment_ids + n, mask=exists, other=-1)
    used = segment >= 0
    shared = shared_turn(places, cos, sin, n, segment, SHAPE, ROTATION)
    q_vectors = _vectors(q_weight, q_weight_stride, q_bias, SHAPE, ROTATION)
    k_vectors = _vectors(k_weight, k_weight_stride, k_bias, SHAPE, ROTATION)
    for head in range(q_heads):
        turn = turn_of(shared, cos, sin, n, head, used, SHAPE, ROTATION)
        # Both before either is stored: the compiler must not move a load past a store.
        q_pairs = load(q, n, head, used, SHAPE, ROTATION)
        k_pairs = load(k, n, head, used & (head < k_heads), SHAPE, ROTATION)
        q_pairs = rotate(norm_pairs(q_pairs, used, q_weight, q_vectors, SHAPE.dim, SHAPE, NORM, EPS), turn, ROTATION)
        store(q_out, n, head, exists, q_pairs, SHAPE, ROTATION)
        k_pairs = rotate(norm_pairs(k_pairs, used, k_weight, k_vectors, SHAPE.dim, SHAPE, NORM, EPS), turn, ROTATION)
        store(k_out, n, head, exists & (head < k_heads), k_pairs, SHAPE, ROTATION)


@triton.jit
def qk_norm_rope_backward_kernel(
    dq, dk, q, k, q_grad, k_grad, q_weight, q_weight_stride, k_weight, k_weight_stride, q_bias, k_bias, partials,
    segment_ids, places, cos, sin, d_cos, d_sin, num_tokens, q_heads, k_heads,
    SHAPE: tl.constexpr, ROTATION: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * SHAPE.rows + tl.arange(0, SHAPE.rows)
    exists = n < num_tokens
    segment = tl.load(segment_ids + n, mask=exists, other=-1)
    used = segment >= 0
    shared = shared_turn(places, cos, sin, n, segment, SHAPE, ROTATION)
    q_vectors = _vectors(q_weight, q_weight_stride, q_bias, SHAPE, ROTATION)
    k_vectors = _vectors(k_weight, k_weight_stride, k_bias, SHAPE, ROTATION)
    q_sums, k_sums = zeros(SHAPE), zeros(SHAPE)
    if NORM == "layer":
        q_bias_sums, k_bias_sums = zeros(SHAPE), zeros(SHAPE)
    if d_cos is not None and not ROTATION.by_head:
        d_shared = zeros(SHAPE)
    shared_back = back(shared)
    for head in range(q_heads):
        k_used = used & (head < k_heads)
        q_grads = load(dq, n, head, used, SHAPE, ROTATION)
        k_grads = load(dk, n, head, k_used, SHAPE, ROTATION)
        # Without a norm the gradient does not depend on what was turned; that of a table does.
        q_pairs = q_grads if q_weight is None and d_cos is None else load(q, n, head, used, SHAPE, ROTATION)
        k_pairs = k_grads if k_weight is None and d_cos is None else load(k, n, head, k_used, SHAPE, ROTATION)
        if d_cos is not None:
            q_normed = norm_pairs(q_pairs, used, q_weight, q_vectors, SHAPE.dim, SHAPE, NORM, EPS)
            k_normed = norm_pairs(k_pairs, used, k_weight, k_vectors, SHAPE.dim, SHAPE, NORM, EPS)
            d_turn = add(turn_gradient(q_grads, q_normed), turn_gradient(k_grads, k_normed))
            if ROTATION.by_head:
                store_turn(d_cos, d_sin, n, head, exists, d_turn, SHAPE, ROTATION)
            else:
                d_shared = add(d_shared, d_turn)
        turn = back_of(shared_back, cos, sin, n, head, used, SHAPE, ROTATION)
        q_grads = rotate(q_grads, turn, ROTATION)
        if NORM == "layer":
            q_bias_sums = add(q_bias_sums, q_grads)
        q_grads, q_sums = norm_gradient(q_grads, q_pairs, q_sums, q_weight, q_vectors, SHAPE.dim, SHAPE, NORM, EPS)
        store(q_grad, n, head, exists, q_grads, SHAPE, ROTATION)
        k_grads = rotate(k_grads, turn, ROTATION)
        if NORM == "layer":
            k_bias_sums = add(k_bias_sums, k_grads)
        k_grads, k_sums = norm_gradient(k_grads, k_pairs, k_sums, k_weight, k_vectors, SHAPE.dim, SHAPE, NORM, EPS)
        store(k_grad, n, head, exists & (head < k_heads), k_grads, SHAPE, ROTATION)
    if d_cos is not None and not ROTATION.by_head:
        store_turn(d_cos, d_sin, n, 0, exists, d_shared, SHAPE, ROTATION)
    if partials is not None:
        # In the order of `Heads.sums`.
        sides: tl.constexpr = 1 if k is None else 2
        vectors: tl.constexpr = 2 * sides if NORM == "layer" else sides
        partials += tl.program_id(0).to(tl.int64) * vectors * SHAPE.dim
        _store_sums(partials, q_sums, SHAPE, ROTATION)
        if k is not None:
            _store_sums(partials + SHAPE.dim, k_sums, SHAPE, ROTATION)
        if NORM == "layer":
            _store_sums(partials + sides * SHAPE.dim, q_bias_sums, SHAPE, ROTATION)
            if k is not None:
                _store_sums(partials + 3 * SHAPE.dim, k_bias_sums, SHAPE, ROTATION)


@triton.jit
def _vectors(weight, stride, bias, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """Weights, and biases if there are any, of both channels [1, p] of every pair; ones without a norm."""
    if weight is None:
        return 1.0, 1.0
    elif bias is None:
        return _vector(weight, stride, SHAPE, ROTATION)
    else:
        a, b = _vector(weight, stride, SHAPE, ROTATION)
        bias_a, bias_b = _vector(bias, 1, SHAPE, ROTATION)
        return a, b, bias_a, bias_b


@triton.jit
def _vector(vector, stride, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    first, second, held = pair_channels(SHAPE, ROTATION)
    a = tl.load(vector + first.to(tl.int64) * stride, mask=held, other=0.0).to(tl.float32)[None, :]
    b = tl.load(vector + second.to(tl.int64) * stride, mask=held, other=0.0).to(tl.float32)[None, :]
    return a, b


@triton.jit
def _store_sums(partials, sums, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    first, second, held = pair_channels(SHAPE, ROTATION)
    tl.store(partials + first, tl.sum(sums[0], axis=0), mask=held)
    tl.store(partials + second, tl.sum(sums[1], axis=0), mask=held)
