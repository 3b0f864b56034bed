"""qk_norm_rope with one norm over all heads of a token: a block is a token, its rows are the heads."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._attention_operands import Rows
from sora_fast.kernels._fold import fold
from sora_fast.kernels._heads import Heads, Shape, add, load, norm_gradient, norm_pairs, store, zeros
from sora_fast.kernels._launch import cdiv, launch
from sora_fast.kernels._rotation import Turning, back, rotate, shared_turn, store_turn, turn_gradient, turn_of


@dataclass(frozen=True)
class TogetherConfig:
    """Not measured yet. A program owns some tokens and walks over them; what is read once stays on chip, where a walk
    over heads would read them twice, for the norm and for the rest."""

    # Of a block. 4 a thread: 16-byte loads of interleaved heads in bf16 and of tables, and backward no spills; 8 warps
    # for 12 heads of 128 channels or 32 of 64, 16 for 24 of 128.
    pairs_a_warp: int = 128
    most_warps: int = 16
    # From 40 heads of 128 channels on, it is 8 a thread and more. Backward, queries and keys then have a launch each:
    # together they would spill, as they do where a table that both share wants a gradient (no model has that here; 176
    # bytes a thread, and of 24 heads of 72 channels still 16 on sm_100).
    pairs_apart: int = 4096
    # A program's. Backward each program writes sums as wide as a token: of 32 tokens they are 1/48 of what they are
    # made from in bf16.
    forward_tokens: int = 4
    backward_tokens: int = 32


def forward(heads: Heads, segment_ids: Tensor, turning: Turning, eps: float) -> tuple[Tensor, Tensor | None]:
    """As in `qk_norm_rope`, with weights [H·D] and [Hk·D]."""
    outputs = heads.empty()
    shape, rows = Shape.of(heads.q, heads.k, *outputs, *_weights(heads), heads=heads.q.shape[1])
    tokens = TogetherConfig.forward_tokens
    launch(
        *(qk_norm_rope_together_forward_kernel, (cdiv(heads.q.shape[0], tokens),), *rows),
        *(segment_ids, turning.places, turning.cos, turning.sin, *heads.counts),
        **{"SHAPE": shape, "ROTATION": turning.rotation, "EPS": eps, "TOKENS": tokens, "num_warps": _num_warps(shape)},
    )
    return outputs


def backward(
    grads: tuple[Tensor, Tensor | None],
    heads: Heads,
    segment_ids: Tensor,
    turning: Turning,
    eps: float,
    *,
    sums: bool,
    d_tables: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As in `qk_norm_rope`; sums: [1 or 2, H, D]."""
    outputs, tokens = heads.empty(), TogetherConfig.backward_tokens
    programs = cdiv(heads.q.shape[0], tokens)
    sizes = (programs, heads.sums, *heads.q.shape[1:]) if sums else (0, *heads.q.shape[1:])
    partials = torch.empty(sizes, dtype=torch.float32, device=heads.q.device)
    by_side = [*partials.unbind(1), None][:2] if sums else [None, None]
    tensors = (*grads, heads.q, heads.k, *outputs, *_weights(heads), *by_side)
    shape, rows = Shape.of(*tensors, heads=heads.q.shape[1])
    rest = (segment_ids, turning.places, turning.cos, turning.sin, *turning.gradients(d_tables), *heads.counts)
    options = {"SHAPE": shape, "ROTATION": turning.rotation, "EPS": eps, "TOKENS": tokens}
    wide = shape.rows * shape.pairs >= TogetherConfig.pairs_apart
    # The gradients of tables are sums over both.
    apart = wide and heads.k is not None and d_tables is None
    for sides in _apart(rows) if apart else [rows]:
        args = (*sides, *rest)
        launch(qk_norm_rope_together_backward_kernel, (programs,), *args, **options, num_warps=_num_warps(shape))
    return *outputs, fold(partials) if sums else partials


def _apart(rows: list[Rows | None]) -> Iterator[list[Rows | None]]:
    """Of arguments for queries and keys in turns: those for queries alone, then those for keys."""
    for side in range(2):
        yield [x if place % 2 == side else None for place, x in enumerate(rows)]


def _weights(heads: Heads) -> list[Tensor | None]:
    """[1, H, D] and [1, Hk, D]: of a token that all tokens share."""
    sides = ((heads.q_weight, heads.q), (heads.k_weight, heads.k))
    return [None if weight is None else weight.unflatten(0, x.shape[1:])[None] for weight, x in sides]


def _num_warps(shape: Shape) -> int:
    warps = shape.rows * shape.pairs // TogetherConfig.pairs_a_warp
    return min(max(warps, 1), TogetherConfig.most_warps)


@triton.jit
def qk_norm_rope_together_forward_kernel(
    q, k, q_out, k_out, q_weight, k_weight,
    segment_ids, places, cos, sin, num_tokens, q_heads, k_heads,
    SHAPE: tl.constexpr, ROTATION: tl.constexpr, EPS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, SHAPE.rows)
    in_q, in_k = head < q_heads, head < k_heads
    q_vectors = _vectors(q_weight, head, in_q, SHAPE, ROTATION)
    k_vectors = _vectors(k_weight, head, in_k, SHAPE, ROTATION)
    first = tl.program_id(0) * TOKENS
    for place in range(first, tl.minimum(first + TOKENS, num_tokens)):
        n = place + tl.arange(0, 1)
        segment = tl.load(segment_ids + n)
        used = segment >= 0
        shared = shared_turn(places, cos, sin, n, segment, SHAPE, ROTATION)
        turn = turn_of(shared, cos, sin, n, head, used & in_q, SHAPE, ROTATION)
        q_pairs = load(q, n, head, used & in_q, SHAPE, ROTATION)
        k_pairs = load(k, n, head, used & in_k, SHAPE, ROTATION)
        q_pairs = norm_pairs(q_pairs, used, q_weight, q_vectors, q_heads * SHAPE.dim, SHAPE, "rms", EPS)
        store(q_out, n, head, in_q, rotate(q_pairs, turn, ROTATION), SHAPE, ROTATION)
        k_pairs = norm_pairs(k_pairs, used, k_weight, k_vectors, k_heads * SHAPE.dim, SHAPE, "rms", EPS)
        store(k_out, n, head, in_k, rotate(k_pairs, turn, ROTATION), SHAPE, ROTATION)


@triton.jit
def qk_norm_rope_together_backward_kernel(
    dq, dk, q, k, q_grad, k_grad, q_weight, k_weight, q_partials, k_partials,
    segment_ids, places, cos, sin, d_cos, d_sin, num_tokens, q_heads, k_heads,
    SHAPE: tl.constexpr, ROTATION: tl.constexpr, EPS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, SHAPE.rows)
    in_q, in_k = head < q_heads, head < k_heads
    q_channels, k_channels = q_heads * SHAPE.dim, k_heads * SHAPE.dim
    q_sums, k_sums = zeros(SHAPE), zeros(SHAPE)
    first = tl.program_id(0) * TOKENS
    for place in range(first, tl.minimum(first + TOKENS, num_tokens)):
        n = place + tl.arange(0, 1)
        segment = tl.load(segment_ids + n)
        used = segment >= 0
        shared = shared_turn(places, cos, sin, n, segment, SHAPE, ROTATION)
        turn = back(turn_of(shared, cos, sin, n, head, used & in_q, SHAPE, ROTATION))
        # Every time anew, from the nearest cache: kept, 5,120 channels of them would spill.
        q_vectors = _vectors(q_weight, head, in_q, SHAPE, ROTATION)
        q_grads = load(dq, n, head, used & in_q, SHAPE, ROTATION)
        q_pairs = q_grads if q_weight is None and d_cos is None else load(q, n, head, used & in_q, SHAPE, ROTATION)
        if d_cos is not None:
            normed = norm_pairs(q_pairs, used, q_weight, q_vectors, q_channels, SHAPE, "rms", EPS)
            d_turn = turn_gradient(q_grads, normed)
        q_grads = rotate(q_grads, turn, ROTATION)
        q_grads, q_sums = norm_gradient(q_grads, q_pairs, q_sums, q_weight, q_vectors, q_channels, SHAPE, "rms", EPS)
        store(q_grad, n, head, in_q, q_grads, SHAPE, ROTATION)
        k_vectors = _vectors(k_weight, head, in_k, SHAPE, ROTATION)
        k_grads = load(dk, n, head, used & in_k, SHAPE, ROTATION)
        k_pairs = k_grads if k_weight is None and d_cos is None else load(k, n, head, used & in_k, SHAPE, ROTATION)
        if d_cos is not None:
            normed = norm_pairs(k_pairs, used, k_weight, k_vectors, k_channels, SHAPE, "rms", EPS)
            d_turn = add(d_turn, turn_gradient(k_grads, normed))
        k_grads = rotate(k_grads, turn, ROTATION)
        k_grads, k_sums = norm_gradient(k_grads, k_pairs, k_sums, k_weight, k_vectors, k_channels, SHAPE, "rms", EPS)
        store(k_grad, n, head, in_k, k_grads, SHAPE, ROTATION)
        if d_cos is not None:
            _store_turn(d_cos, d_sin, n, head, in_q, d_turn, SHAPE, ROTATION)
    program = tl.program_id(0) + tl.arange(0, 1)
    store(q_partials, program, head, in_q, q_sums, SHAPE, ROTATION)
    # As wide as the queries': zeros for the heads that the keys lack.
    store(k_partials, program, head, in_q, k_sums, SHAPE, ROTATION)


@triton.jit
def _vectors(weight, head, real, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """Weights of both channels [head, p] of every pair; ones without a norm."""
    if weight is None:
        return 1.0, 1.0
    else:
        return load(weight, tl.arange(0, 1), head, real, SHAPE, ROTATION)


@triton.jit
def _store_turn(d_cos, d_sin, n, head, real, d_turn, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """Of every head, or summed over them."""
    if ROTATION.by_head:
        store_turn(d_cos, d_sin, n, head, real, d_turn, SHAPE, ROTATION)
    else:
        a, b = tl.sum(d_turn[0], axis=0)[None, :], tl.sum(d_turn[1], axis=0)[None, :]
        store_turn(d_cos, d_sin, n, 0, n >= 0, (a, b), SHAPE, ROTATION)
