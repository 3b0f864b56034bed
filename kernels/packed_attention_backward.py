"""Packed attention, backward, in either of two forms.

With P the attention weights, dS = P · (dO Vᵀ − delta), delta = rowsum(dO · O) − dlse: dV = Pᵀ dO, dQ = scale · dS K,
dK = scale · dSᵀ Q.

In two passes: dQ by blocks of queries, then dK and dV by blocks of keys; every gradient is the sum of one program in a
fixed order, equal bits in every run. In one pass: by blocks of keys, which add their share of dQ to fp32 sums by
atomics: five products of matrices instead of seven, but the order of the sums is whatever the GPU makes it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._attention import (
    CUT,
    LOG2E,
    TESTED,
    WHOLE,
    Boxes,
    Head,
    Walk,
    add_rows,
    block_bounds,
    count_blocks,
    dot_precision,
    is_allowed,
    load_boxes,
    load_main,
    load_numbers,
    load_places,
    load_rest,
    own_block,
    padding_bounds,
    store_rows,
    stretches,
    zero_block,
)
from sora_fast.kernels._attention_config import block_sizes, is_one_pass_faster
from sora_fast.kernels._launch import launch, target_arch


@dataclass(frozen=True, eq=False)
class _Problem:
    """What both forms of the backward pass start from; see `backward`."""

    grad_out: Tensor
    grad_lse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    by_query: Walk
    by_key: Walk
    boxes: Boxes | None
    tile_sizes: tuple[int, int]
    scale: float
    causal: bool

    def shared(self, head: Head) -> dict[str, Any]:
        """Compile-time constants of every kernel."""
        return {"HEAD": head, "CAUSAL": self.causal, "PRECISION": dot_precision(self.q.dtype)}


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    by_query: Walk,
    by_key: Walk,
    boxes: Boxes | None,
    *,
    tile_sizes: tuple[int, int],
    scale: float,
    causal: bool,
    keys: bool,
    deterministic: bool,
) -> list[Tensor]:
    """Gradients of q, k, v; keys: False: of q alone, which saves more than half of the work.

    grad_out [N, H, D], grad_lse [H, N] (None: zero); the rest as `forward` took and gave it. by_query: the walk from
    queries to keys; by_key: from keys to queries. deterministic: take the two passes; else whichever form is faster.
    """
    problem = _Problem(
        grad_out, grad_lse, q, k, v, out, lse, by_query, by_key, boxes, tile_sizes, scale, causal
    )  # fmt: skip
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    if keys and not deterministic and is_one_pass_faster(q.shape[2], target_arch(q.device)):
        sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        _launch_delta(problem, delta)
        _launch_grad_key_value(problem, delta, grad_k, grad_v, sums)
        return [torch.mul(sums, scale, out=grad_q), grad_k, grad_v]
    _launch_grad_query(problem, delta, grad_q)
    if not keys:
        return [grad_q]
    _launch_grad_key_value(problem, delta, grad_k, grad_v, None)
    return [grad_q, grad_k, grad_v]


# Rows of a block of the delta kernel, which reads two rows of a head and writes a number. 64 spill 48 bytes a thread at
# head dim 192 on sm_100.
DELTA_BLOCK = 32


def _launch_grad_query(p: _Problem, delta: Tensor, grad_q: Tensor) -> None:
    """The first of the two passes; it fills `delta` [H, N] for the second."""
    head = Head.of(p.q, p.k, p.v, p.out, p.grad_out, grad_q)
    blocks = block_sizes("grad_query", p.q.dtype, head.dim, target_arch(p.q.device)).fitted(*p.tile_sizes)
    parts = triton.cdiv(p.tile_sizes[0], blocks.own)
    launch(
        packed_attention_grad_query_kernel,
        (p.by_query.order.shape[0] * parts, p.q.shape[1]),
        *(p.lse, p.grad_lse, delta),
        *(head.rows(x) for x in (p.q, p.k, p.v, p.out, p.grad_out, grad_q)),
        *(p.by_query, p.boxes, p.scale * LOG2E.value, p.scale, p.q.shape[0]),
        PARTS=parts,
        BLOCK_M=blocks.own,
        BLOCK_N=blocks.other,
        BLOCKS_PER_TILE=triton.cdiv(p.tile_sizes[1], blocks.other),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **p.shared(head),
    )


def _launch_delta(p: _Problem, delta: Tensor) -> None:
    """What the one pass needs beforehand."""
    head = Head.of(p.out, p.out, p.grad_out)
    launch(
        packed_attention_delta_kernel,
        (triton.cdiv(p.out.shape[0], DELTA_BLOCK), p.out.shape[1]),
        *(p.grad_lse, delta, head.rows(p.out), head.rows(p.grad_out), p.out.shape[0]),
        HEAD=head,
        BLOCK=DELTA_BLOCK,
        num_warps=4,
    )


def _launch_grad_key_value(
    p: _Problem, delta: Tensor, grad_k: Tensor, grad_v: Tensor, query_sums: Tensor | None
) -> None:
    """dK and dV; query_sums [N, H, D] float32: add dQ / scale to it, in no fixed order."""
    more = () if query_sums is None else (query_sums,)
    head = Head.of(p.q, p.k, p.v, p.grad_out, grad_k, grad_v, *more)
    name = "grad_key_value" if query_sums is None else "one_pass"
    query_tile, key_tile = p.tile_sizes
    blocks = block_sizes(name, p.q.dtype, head.dim, target_arch(p.q.device)).fitted(key_tile, query_tile)
    parts = triton.cdiv(key_tile, blocks.own)
    launch(
        packed_attention_grad_key_value_kernel,
        (p.by_key.order.shape[0] * parts, p.k.shape[1]),
        *(p.lse, delta),
        *(head.rows(x) for x in (p.q, p.k, p.v, p.grad_out, grad_k, grad_v)),
        None if query_sums is None else head.rows(query_sums),
        *(p.by_key, p.boxes, p.scale * LOG2E.value, p.scale, p.q.shape[0], p.k.shape[0]),
        PARTS=parts,
        BLOCK_M=blocks.other,
        BLOCK_N=blocks.own,
        BLOCKS_PER_TILE=triton.cdiv(query_tile, blocks.other),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **p.shared(head),
    )


@triton.jit
def packed_attention_delta_kernel(
    grad_lse,
    delta,
    out,
    grad_out,
    num_tokens,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    exists = start + tl.arange(0, BLOCK) < num_tokens
    place = head.to(tl.int64) * num_tokens + start + tl.arange(0, BLOCK)
    do0 = load_main(grad_out, start, head, exists, BLOCK, HEAD)
    do1 = load_rest(grad_out, start, head, exists, BLOCK, HEAD) if HEAD.rest else do0
    tl.store(delta + place, _row_delta(do0, do1, out, grad_lse, place, start, head, exists, HEAD), mask=exists)


@triton.jit
def _row_delta(do0, do1, out, grad_lse, place, start, head, exists, HEAD: tl.constexpr):
    rows: tl.constexpr = do0.shape[0]
    row_delta = tl.sum(do0.to(tl.float32) * load_main(out, start, head, exists, rows, HEAD).to(tl.float32), 1)
    if HEAD.rest:
        row_delta += tl.sum(do1.to(tl.float32) * load_rest(out, start, head, exists, rows, HEAD).to(tl.float32), 1)
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + place, mask=exists, other=0.0)
    return row_delta


@triton.jit
def packed_attention_grad_query_kernel(
    lse,
    grad_lse,
    delta,
    q,
    k,
    v,
    out,
    grad_out,
    grad_q,
    walk,
    boxes,
    scale_log2,
    scale,
    num_tokens,
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ, and on the way delta [H, N] for the other pass."""
    slot, head = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    acc0, acc1 = zero_block(BLOCK_M, HEAD)
    first, stride = padding_bounds(walk, slot, PARTS, BLOCK_M)
    for step in range(0, tl.cdiv(num_tokens - first, stride)):
        start = first + step * stride
        store_rows(grad_q, start, head, start + rows < num_tokens, acc0, acc1, HEAD)

    tile, start, stop = own_block(walk, slot, PARTS, BLOCK_M)
    if start >= stop:
        return
    exists = start + rows < stop
    place = head.to(tl.int64) * num_tokens + start + rows
    do0 = load_main(grad_out, start, head, exists, BLOCK_M, HEAD)
    do1 = load_rest(grad_out, start, head, exists, BLOCK_M, HEAD) if HEAD.rest else do0
    row_delta = _row_delta(do0, do1, out, grad_lse, place, start, head, exists, HEAD)
    tl.store(delta + place, row_delta, mask=exists)
    row_lse = _load_lse(lse, place, exists)
    q0 = load_main(q, start, head, exists, BLOCK_M, HEAD)
    q1 = load_rest(q, start, head, exists, BLOCK_M, HEAD) if HEAD.rest else q0

    first, last, rest_first, rest_last = stretches(walk, tile, FROM_END=False, BLOCK=BLOCK_N)
    acc0, acc1 = _walk_keys(
        acc0, acc1, q0, q1, do0, do1, row_lse, row_delta, k, v, walk, first, last, boxes, start, exists, head,
        scale_log2, WHOLE if walk.tiles is None else CUT, HEAD, BLOCK_N, BLOCKS_PER_TILE, CAUSAL, PRECISION,
    )  # fmt: skip
    acc0, acc1 = _walk_keys(
        acc0, acc1, q0, q1, do0, do1, row_lse, row_delta, k, v, walk, rest_first, rest_last, boxes, start, exists,
        head, scale_log2, CUT if boxes is None else TESTED, HEAD, BLOCK_N, BLOCKS_PER_TILE, CAUSAL, PRECISION,
    )  # fmt: skip
    store_rows(grad_q, start, head, exists, acc0 * scale, acc1 * scale if HEAD.rest else acc1, HEAD)


@triton.jit
def _load_lse(lse, place, exists):
    """Base-2 logsumexp of queries; +inf, which makes every weight zero, for those that met no key or do not exist."""
    loaded = load_numbers(lse, place, exists, float("inf"))
    return tl.where(loaded == float("-inf"), float("inf"), loaded * LOG2E)


@triton.jit
def _walk_keys(
    acc0,
    acc1,
    q0,
    q1,
    do0,
    do1,
    row_lse,
    row_delta,
    k,
    v,
    walk,
    first,
    last,
    boxes,
    start,
    valid,
    head,
    scale_log2,
    ASKED: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum dS K over a stretch of the walk."""
    kv_head = head // HEAD.group
    if ASKED == TESTED:
        low, high, query_raster = load_boxes(boxes, start + tl.arange(0, q0.shape[0]), valid, CAUSAL)
        low, high, query_raster = low[:, None], high[:, None], query_raster[:, None]
    for step in range(0, count_blocks(walk, first, last, BLOCKS_PER_TILE, BLOCK_N)):
        key, stop = block_bounds(walk, first, last, step, BLOCKS_PER_TILE, BLOCK_N)
        exists = None if ASKED == WHOLE else key + tl.arange(0, BLOCK_N) < stop
        k0 = load_main(k, key, kv_head, exists, BLOCK_N, HEAD)
        v0 = load_main(v, key, kv_head, exists, BLOCK_N, HEAD)
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        slopes = tl.dot(do0, tl.trans(v0), input_precision=PRECISION)
        if HEAD.rest:
            k1 = load_rest(k, key, kv_head, exists, BLOCK_N, HEAD)
            v1 = load_rest(v, key, kv_head, exists, BLOCK_N, HEAD)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
            slopes = tl.dot(do1, tl.trans(v1), slopes, input_precision=PRECISION)
        weights = tl.exp2(scores * scale_log2 - row_lse[:, None])
        if ASKED == TESTED:
            place, key_raster = load_places(boxes, key + tl.arange(0, BLOCK_N), exists, CAUSAL)
            allowed = is_allowed(low, high, query_raster, place[None, :], key_raster[None, :], CAUSAL)
            weights = tl.where(allowed, weights, 0.0)
        elif ASKED != WHOLE:  # noqa: SIM102
            if key + BLOCK_N > stop:
                weights = tl.where(exists[None, :], weights, 0.0)
        slopes = (weights * (slopes - row_delta[:, None])).to(k0.dtype)
        acc0 = tl.dot(slopes, k0, acc0, input_precision=PRECISION)
        if HEAD.rest:
            acc1 = tl.dot(slopes, k1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def packed_attention_grad_key_value_kernel(
    lse,
    delta,
    q,
    k,
    v,
    grad_out,
    grad_k,
    grad_v,
    query_sums,
    walk,
    boxes,
    scale_log2,
    scale,
    num_queries,
    num_keys,
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV, and where `query_sums` is given, dQ / scale into it."""
    slot, head = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BLOCK_N)
    dk0, dk1 = zero_block(BLOCK_N, HEAD)
    dv0, dv1 = zero_block(BLOCK_N, HEAD)
    first, stride = padding_bounds(walk, slot, PARTS, BLOCK_N)
    for step in range(0, tl.cdiv(num_keys - first, stride)):
        start = first + step * stride
        padding = start + rows < num_keys
        store_rows(grad_k, start, head, padding, dk0, dk1, HEAD)
        store_rows(grad_v, start, head, padding, dv0, dv1, HEAD)

    tile, start, stop = own_block(walk, slot, PARTS, BLOCK_N)
    if start >= stop:
        return
    exists = start + rows < stop
    k0 = load_main(k, start, head, exists, BLOCK_N, HEAD)
    v0 = load_main(v, start, head, exists, BLOCK_N, HEAD)
    k1 = load_rest(k, start, head, exists, BLOCK_N, HEAD) if HEAD.rest else k0
    v1 = load_rest(v, start, head, exists, BLOCK_N, HEAD) if HEAD.rest else v0

    first, last, rest_first, rest_last = stretches(walk, tile, FROM_END=True, BLOCK=BLOCK_M)
    dk0, dk1, dv0, dv1 = _walk_queries(
        dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, grad_out, query_sums, lse, delta, walk, first, last, boxes, start,
        exists, head, scale_log2, num_queries, WHOLE if walk.tiles is None else CUT,
        HEAD, BLOCK_M, BLOCKS_PER_TILE, CAUSAL, PRECISION,
    )  # fmt: skip
    dk0, dk1, dv0, dv1 = _walk_queries(
        dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, grad_out, query_sums, lse, delta, walk, rest_first, rest_last, boxes,
        start, exists, head, scale_log2, num_queries, CUT if boxes is None else TESTED,
        HEAD, BLOCK_M, BLOCKS_PER_TILE, CAUSAL, PRECISION,
    )  # fmt: skip
    store_rows(grad_k, start, head, exists, dk0 * scale, dk1 * scale if HEAD.rest else dk1, HEAD)
    store_rows(grad_v, start, head, exists, dv0, dv1, HEAD)


@triton.jit
def _walk_queries(
    dk0,
    dk1,
    dv0,
    dv1,
    k0,
    k1,
    v0,
    v1,
    q,
    grad_out,
    query_sums,
    lse,
    delta,
    walk,
    first,
    last,
    boxes,
    start,
    valid,
    kv_head,
    scale_log2,
    num_queries,
    ASKED: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum dSᵀ Q and Pᵀ dO over a stretch of the walk, and over all query heads of the group at every block of it.

    All blocks are [keys, queries]. A query that does not exist has logsumexp +inf: its weights are zero, and no other
    test is needed. Keys that do not exist gather numbers that are never stored, and that may be infinite: dQ must not
    see them.
    """
    if ASKED == TESTED:
        place, key_raster = load_places(boxes, start + tl.arange(0, k0.shape[0]), valid, CAUSAL)
        place, key_raster = place[:, None], key_raster[:, None]
    for step in range(0, count_blocks(walk, first, last, BLOCKS_PER_TILE, BLOCK_M) * HEAD.group):
        head = kv_head * HEAD.group + step % HEAD.group
        query, stop = block_bounds(walk, first, last, step // HEAD.group, BLOCKS_PER_TILE, BLOCK_M)
        exists = None if ASKED == WHOLE else query + tl.arange(0, BLOCK_M) < stop
        q0 = load_main(q, query, head, exists, BLOCK_M, HEAD)
        do0 = load_main(grad_out, query, head, exists, BLOCK_M, HEAD)
        scores = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
        slopes = tl.dot(v0, tl.trans(do0), input_precision=PRECISION)
        if HEAD.rest:
            q1 = load_rest(q, query, head, exists, BLOCK_M, HEAD)
            do1 = load_rest(grad_out, query, head, exists, BLOCK_M, HEAD)
            scores = tl.dot(k1, tl.trans(q1), scores, input_precision=PRECISION)
            slopes = tl.dot(v1, tl.trans(do1), slopes, input_precision=PRECISION)
        rows = head.to(tl.int64) * num_queries + query + tl.arange(0, BLOCK_M)
        row_lse = _load_lse(lse, rows, exists)
        row_delta = load_numbers(delta, rows, exists, 0.0)
        weights = tl.exp2(scores * scale_log2 - row_lse[None, :])
        if ASKED == TESTED:
            low, high, query_raster = load_boxes(boxes, query + tl.arange(0, BLOCK_M), exists, CAUSAL)
            allowed = is_allowed(low[None, :], high[None, :], query_raster[None, :], place, key_raster, CAUSAL)
            weights = tl.where(allowed, weights, 0.0)
        slopes = (weights * (slopes - row_delta[None, :])).to(q0.dtype)
        weights = weights.to(q0.dtype)
        dv0 = tl.dot(weights, do0, dv0, input_precision=PRECISION)
        dk0 = tl.dot(slopes, q0, dk0, input_precision=PRECISION)
        if HEAD.rest:
            dv1 = tl.dot(weights, do1, dv1, input_precision=PRECISION)
            dk1 = tl.dot(slopes, q1, dk1, input_precision=PRECISION)
        if query_sums is not None:
            slopes = tl.where(valid[:, None], slopes, 0.0)
            dq0 = tl.dot(tl.trans(slopes), k0, input_precision=PRECISION)
            dq1 = tl.dot(tl.trans(slopes), k1, input_precision=PRECISION) if HEAD.rest else dq0
            add_rows(query_sums, query, head, exists, dq0, dq1, HEAD)
    return dk0, dk1, dv0, dv1
