"""Packed attention, backward, in two passes without atomics: dQ by blocks of queries, then dK and dV by blocks of keys.

With P the attention weights, dS = P · (dO Vᵀ − delta), delta = rowsum(dO · O) − dlse: dV = Pᵀ dO, dQ = scale · dS K,
dK = scale · dSᵀ Q. Every gradient is the sum of one program in a fixed order: equal bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._attention import (
    LOG2E,
    Boxes,
    Head,
    Walk,
    dot_precision,
    is_allowed,
    load_boxes,
    load_main,
    load_places,
    load_rest,
    own_block,
    padding_bounds,
    step_bounds,
    store_rows,
    zero_block,
)
from sora_fast.kernels._attention_config import block_sizes
from sora_fast.kernels._launch import launch, target_arch


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
) -> list[Tensor]:
    """Gradients of q, k, v; keys: False: of q alone, which saves more than half of the work.

    grad_out [N, H, D], grad_lse [H, N] (None: zero); the rest as `forward` took and gave it. by_query: the walk from
    queries to keys; by_key: from keys to queries.
    """
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in ((q, k, v) if keys else (q,))]
    delta = torch.empty_like(lse)
    head = Head.of(q, k, v, out, grad_out, *grads)
    num_heads = q.shape[1]
    query_tile, key_tile = tile_sizes
    shared = {"HEAD": head, "CAUSAL": causal, "PRECISION": dot_precision(q.dtype)}

    blocks = block_sizes("grad_query", q.dtype, head.width, target_arch(q.device)).fitted(query_tile, key_tile)
    parts = triton.cdiv(query_tile, blocks.own)
    launch(
        grad_query_kernel,
        (by_query.order.shape[0] * parts, num_heads),
        *(lse, grad_lse, delta),
        *(head.rows(x) for x in (q, k, v, out, grad_out, grads[0])),
        *(by_query, boxes, scale * LOG2E.value, scale, q.shape[0]),
        PARTS=parts,
        BLOCK_M=blocks.own,
        BLOCK_N=blocks.other,
        BLOCKS_PER_TILE=triton.cdiv(key_tile, blocks.other),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **shared,
    )
    if not keys:
        return grads
    blocks = block_sizes("grad_key_value", q.dtype, head.width, target_arch(q.device)).fitted(key_tile, query_tile)
    parts = triton.cdiv(key_tile, blocks.own)
    launch(
        grad_key_value_kernel,
        (by_key.order.shape[0] * parts, num_heads),
        *(lse, delta),
        *(head.rows(x) for x in (q, k, v, grad_out, *grads[1:])),
        *(by_key, boxes, scale * LOG2E.value, scale, q.shape[0], k.shape[0]),
        PARTS=parts,
        BLOCK_M=blocks.other,
        BLOCK_N=blocks.own,
        BLOCKS_PER_TILE=triton.cdiv(query_tile, blocks.other),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **shared,
    )
    return grads


@triton.jit
def grad_query_kernel(
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
    do0 = load_main(grad_out, start, head, exists, HEAD)
    row_delta = tl.sum(do0.to(tl.float32) * load_main(out, start, head, exists, HEAD).to(tl.float32), 1)
    do1 = do0
    if HEAD.rest:
        do1 = load_rest(grad_out, start, head, exists, HEAD)
        row_delta += tl.sum(do1.to(tl.float32) * load_rest(out, start, head, exists, HEAD).to(tl.float32), 1)
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + place, mask=exists, other=0.0)
    tl.store(delta + place, row_delta, mask=exists)
    row_lse = _load_lse(lse, place, exists)
    q0 = load_main(q, start, head, exists, HEAD)
    q1 = load_rest(q, start, head, exists, HEAD) if HEAD.rest else q0

    begin, full_end, end = tl.load(walk.begin + tile), tl.load(walk.full_end + tile), tl.load(walk.end + tile)
    acc0, acc1 = _walk_keys(
        acc0, acc1, q0, q1, do0, do1, row_lse, row_delta, k, v, walk, begin, full_end, None, start, exists, head,
        scale_log2, HEAD, BLOCK_N, BLOCKS_PER_TILE, CAUSAL, PRECISION,
    )  # fmt: skip
    if boxes is not None:
        acc0, acc1 = _walk_keys(
            acc0, acc1, q0, q1, do0, do1, row_lse, row_delta, k, v, walk, full_end, end, boxes, start, exists, head,
            scale_log2, HEAD, BLOCK_N, BLOCKS_PER_TILE, CAUSAL, PRECISION,
        )  # fmt: skip
    store_rows(grad_q, start, head, exists, acc0 * scale, acc1 * scale if HEAD.rest else acc1, HEAD)


@triton.jit
def _load_lse(lse, place, exists):
    """Base-2 logsumexp of queries; +inf, which makes every weight zero, for those that met no key or do not exist."""
    loaded = tl.load(lse + place, mask=exists, other=float("inf"))
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
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum dS K over the key tiles at entries first … last of the walk; boxes: test every pair of tokens."""
    if boxes is not None:
        low, high, query_raster = load_boxes(boxes, start + tl.arange(0, q0.shape[0]), valid, CAUSAL)
        low, high, query_raster = low[:, None], high[:, None], query_raster[:, None]
    for step in range(0, (last - first) * BLOCKS_PER_TILE):
        key_start, key_stop = step_bounds(walk, first, step, BLOCKS_PER_TILE, BLOCK_N)
        key = key_start + tl.arange(0, BLOCK_N)
        exists = key < key_stop
        k0 = load_main(k, key_start, head, exists, HEAD)
        v0 = load_main(v, key_start, head, exists, HEAD)
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        slopes = tl.dot(do0, tl.trans(v0), input_precision=PRECISION)
        if HEAD.rest:
            k1 = load_rest(k, key_start, head, exists, HEAD)
            v1 = load_rest(v, key_start, head, exists, HEAD)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
            slopes = tl.dot(do1, tl.trans(v1), slopes, input_precision=PRECISION)
        allowed = exists[None, :]
        if boxes is not None:
            place, key_raster = load_places(boxes, key, exists, CAUSAL)
            allowed = is_allowed(low, high, query_raster, place[None, :], key_raster[None, :], CAUSAL)
        weights = tl.where(allowed, tl.exp2(scores * scale_log2 - row_lse[:, None]), 0.0)
        slopes = (weights * (slopes - row_delta[:, None])).to(k0.dtype)
        acc0 = tl.dot(slopes, k0, acc0, input_precision=PRECISION)
        if HEAD.rest:
            acc1 = tl.dot(slopes, k1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def grad_key_value_kernel(
    lse,
    delta,
    q,
    k,
    v,
    grad_out,
    grad_k,
    grad_v,
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
    slot, head = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BLOCK_N)
    lse += head.to(tl.int64) * num_queries
    delta += head.to(tl.int64) * num_queries
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
    k0 = load_main(k, start, head, exists, HEAD)
    v0 = load_main(v, start, head, exists, HEAD)
    k1 = load_rest(k, start, head, exists, HEAD) if HEAD.rest else k0
    v1 = load_rest(v, start, head, exists, HEAD) if HEAD.rest else v0

    begin, full_end, end = tl.load(walk.begin + tile), tl.load(walk.full_end + tile), tl.load(walk.end + tile)
    dk0, dk1, dv0, dv1 = _walk_queries(
        dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, grad_out, lse, delta, walk, begin, full_end, None, start, exists, head,
        scale_log2, HEAD, BLOCK_M, BLOCKS_PER_TILE, CAUSAL, PRECISION,
    )  # fmt: skip
    if boxes is not None:
        dk0, dk1, dv0, dv1 = _walk_queries(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, grad_out, lse, delta, walk, full_end, end, boxes, start, exists,
            head, scale_log2, HEAD, BLOCK_M, BLOCKS_PER_TILE, CAUSAL, PRECISION,
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
    lse,
    delta,
    walk,
    first,
    last,
    boxes,
    start,
    valid,
    head,
    scale_log2,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum dSᵀ Q and Pᵀ dO over the query tiles at entries first … last of the walk.

    All blocks are [keys, queries]. A query that does not exist has logsumexp +inf: its weights are zero, and no other
    test is needed. Keys that do not exist gather numbers that are never stored.
    """
    if boxes is not None:
        place, key_raster = load_places(boxes, start + tl.arange(0, k0.shape[0]), valid, CAUSAL)
        place, key_raster = place[:, None], key_raster[:, None]
    for step in range(0, (last - first) * BLOCKS_PER_TILE):
        query_start, query_stop = step_bounds(walk, first, step, BLOCKS_PER_TILE, BLOCK_M)
        query = query_start + tl.arange(0, BLOCK_M)
        exists = query < query_stop
        q0 = load_main(q, query_start, head, exists, HEAD)
        do0 = load_main(grad_out, query_start, head, exists, HEAD)
        scores = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
        slopes = tl.dot(v0, tl.trans(do0), input_precision=PRECISION)
        if HEAD.rest:
            q1 = load_rest(q, query_start, head, exists, HEAD)
            do1 = load_rest(grad_out, query_start, head, exists, HEAD)
            scores = tl.dot(k1, tl.trans(q1), scores, input_precision=PRECISION)
            slopes = tl.dot(v1, tl.trans(do1), slopes, input_precision=PRECISION)
        row_lse = _load_lse(lse, query, exists)
        row_delta = tl.load(delta + query, mask=exists, other=0.0)
        weights = tl.exp2(scores * scale_log2 - row_lse[None, :])
        if boxes is not None:
            low, high, query_raster = load_boxes(boxes, query, exists, CAUSAL)
            allowed = is_allowed(low[None, :], high[None, :], query_raster[None, :], place, key_raster, CAUSAL)
            weights = tl.where(allowed, weights, 0.0)
        slopes = (weights * (slopes - row_delta[None, :])).to(q0.dtype)
        weights = weights.to(q0.dtype)
        dv0 = tl.dot(weights, do0, dv0, input_precision=PRECISION)
        dk0 = tl.dot(slopes, q0, dk0, input_precision=PRECISION)
        if HEAD.rest:
            dv1 = tl.dot(weights, do1, dv1, input_precision=PRECISION)
            dk1 = tl.dot(slopes, q1, dk1, input_precision=PRECISION)
    return dk0, dk1, dv0, dv1
