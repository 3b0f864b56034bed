"""Packed attention, forward: one program a block of queries and a head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._attention import (
    CUT,
    LN2,
    LOG2E,
    TESTED,
    WHOLE,
    Boxes,
    Head,
    Walk,
    block_bounds,
    count_blocks,
    dot_precision,
    is_allowed,
    load_boxes,
    load_main,
    load_places,
    load_rest,
    own_block,
    padding_bounds,
    store_rows,
    stretches,
    zero_block,
)
from sora_fast.kernels._attention_config import block_sizes
from sora_fast.kernels._launch import launch, target_arch


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    walk: Walk,
    boxes: Boxes | None,
    *,
    tile_sizes: tuple[int, int],
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Output [N, H, D] and natural logsumexp [H, N] float32 of attention over the tiles that `walk` lists.

    q [N, H, D]; k, v [Nk, Hk, D]: any strides; Hk divides H. walk: from queries to keys. boxes: None under a full mask.
    tile_sizes: most tokens in a tile of queries, of keys. causal: partial pairs compare raster places too.
    """
    if scale < 0:  # the largest score is looked for before scaling
        q, scale = -q, -scale
    scale = max(scale, torch.finfo(torch.float32).tiny)  # 0 · −inf, of a pair that is not allowed, would be NaN
    num_tokens, num_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=q.device)
    head = Head.of(q, k, v, out)
    blocks = block_sizes("forward", q.dtype, head.dim, target_arch(q.device)).fitted(*tile_sizes)
    parts = triton.cdiv(tile_sizes[0], blocks.own)
    launch(
        packed_attention_forward_kernel,
        (walk.order.shape[0] * parts, num_heads),
        lse,
        *(head.rows(x) for x in (q, k, v, out)),
        *(walk, boxes, scale * LOG2E.value, num_tokens),
        HEAD=head,
        PARTS=parts,
        BLOCK_M=blocks.own,
        BLOCK_N=blocks.other,
        BLOCKS_PER_TILE=triton.cdiv(tile_sizes[1], blocks.other),
        CAUSAL=causal,
        PRECISION=dot_precision(q.dtype),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return out, lse


@triton.jit
def packed_attention_forward_kernel(
    lse,
    q,
    k,
    v,
    out,
    walk,
    boxes,
    scale,  # times log2 e
    num_tokens,
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot, head = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    lse += head.to(tl.int64) * num_tokens
    acc0, acc1 = zero_block(BLOCK_M, HEAD)

    first, stride = padding_bounds(walk, slot, PARTS, BLOCK_M)
    for step in range(0, tl.cdiv(num_tokens - first, stride)):
        start = first + step * stride
        padding = start + rows < num_tokens
        store_rows(out, start, head, padding, acc0, acc1, HEAD)
        tl.store(lse + start + rows, float("-inf"), mask=padding)

    tile, start, stop = own_block(walk, slot, PARTS, BLOCK_M)
    if start >= stop:
        return
    exists = start + rows < stop
    q0 = load_main(q, start, head, exists, BLOCK_M, HEAD)
    q1 = load_rest(q, start, head, exists, BLOCK_M, HEAD) if HEAD.rest else q0
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)

    first, last, rest_first, rest_last = stretches(walk, tile, FROM_END=False, BLOCK=BLOCK_N)
    acc0, acc1, total, top = _walk_keys(
        acc0, acc1, total, top, q0, q1, k, v, walk, first, last, boxes, start, exists, head, scale,
        WHOLE if walk.tiles is None else CUT, HEAD, BLOCK_N, BLOCKS_PER_TILE, CAUSAL, PRECISION,
    )  # fmt: skip
    acc0, acc1, total, top = _walk_keys(
        acc0, acc1, total, top, q0, q1, k, v, walk, rest_first, rest_last, boxes, start, exists, head, scale,
        CUT if boxes is None else TESTED, HEAD, BLOCK_N, BLOCKS_PER_TILE, CAUSAL, PRECISION,
    )  # fmt: skip

    # A query that met no key has total 0 and top -inf: output 0, lse -inf.
    total = tl.where(total == 0.0, 1.0, total)
    inverse = (1.0 / total)[:, None]
    store_rows(out, start, head, exists, acc0 * inverse, acc1 * inverse if HEAD.rest else acc1, HEAD)
    tl.store(lse + start + rows, (top * scale + tl.log2(total)) * LN2, mask=exists)


@triton.jit
def _walk_keys(
    acc0,
    acc1,
    total,
    top,
    q0,
    q1,
    k,
    v,
    walk,
    first,
    last,
    boxes,
    start,
    valid,
    head,
    scale,
    ASKED: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over a stretch of the walk. top: the largest score so far, not scaled."""
    kv_head = head // HEAD.group
    if ASKED == TESTED:
        low, high, query_raster = load_boxes(boxes, start + tl.arange(0, q0.shape[0]), valid, CAUSAL)
        low, high, query_raster = low[:, None], high[:, None], query_raster[:, None]
    for step in range(0, count_blocks(walk, first, last, BLOCKS_PER_TILE, BLOCK_N)):
        key, stop = block_bounds(walk, first, last, step, BLOCKS_PER_TILE, BLOCK_N)
        exists = None if ASKED == WHOLE else key + tl.arange(0, BLOCK_N) < stop
        k0 = load_main(k, key, kv_head, exists, BLOCK_N, HEAD)
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if HEAD.rest:
            k1 = load_rest(k, key, kv_head, exists, BLOCK_N, HEAD)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
        if ASKED == TESTED:
            place, key_raster = load_places(boxes, key + tl.arange(0, BLOCK_N), exists, CAUSAL)
            allowed = is_allowed(low, high, query_raster, place[None, :], key_raster[None, :], CAUSAL)
            scores = tl.where(allowed, scores, float("-inf"))
        elif ASKED != WHOLE:  # noqa: SIM102
            if key + BLOCK_N > stop:
                scores = tl.where(exists[None, :], scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, 1))
        # Rows that have met no key yet: -inf - -inf would be NaN.
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale - (finite * scale)[:, None])
        rescale = tl.exp2((top - finite) * scale)
        total = total * rescale + tl.sum(weights, 1)
        top = new_top
        v0 = load_main(v, key, kv_head, exists, BLOCK_N, HEAD)
        weights = weights.to(v0.dtype)
        acc0 = tl.dot(weights, v0, acc0 * rescale[:, None], input_precision=PRECISION)
        if HEAD.rest:
            v1 = load_rest(v, key, kv_head, exists, BLOCK_N, HEAD)
            acc1 = tl.dot(weights, v1, acc1 * rescale[:, None], input_precision=PRECISION)
    return acc0, acc1, total, top
