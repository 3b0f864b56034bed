"""Packed attention, forward: a program takes blocks of queries of one head, and walks over the keys that each meets."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._attention_config import block_sizes
from sora_fast.kernels._attention_operands import (
    Block,
    Head,
    add_products,
    describable,
    load_block,
    load_next,
    products,
    scaled,
    store_block,
    zero_block,
)
from sora_fast.kernels._attention_walk import (
    CUT,
    LN2,
    LOG2E,
    TESTED,
    WHOLE,
    Boxes,
    Stretch,
    Walk,
    block_bounds,
    count_blocks,
    count_slots,
    is_allowed,
    item_of,
    load_boxes,
    load_places,
    mask_kind,
    num_programs,
    own_block,
    padding_blocks,
    rows_of,
    slot_and_head,
    split_walk,
)
from sora_fast.kernels._launch import launch, target_arch

_TINY, _LOG2E = torch.finfo(torch.float32).tiny, LOG2E.value  # the host asks for them in every call


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
    scale = max(scale, _TINY)  # 0 · −inf, of a pair that is not allowed, would be NaN
    num_tokens, num_heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((num_heads, num_tokens), dtype=torch.float32)
    head, arch = Head.of(q, k, v, out), target_arch(q.device)
    blocks = block_sizes("forward", q.dtype, head.dim, arch, mask_kind(walk, boxes))
    described = walk.tiles is None and describable(arch, k, v)
    blocking = blocks.blocking(*tile_sizes, causal=causal, described=described)
    launch(
        packed_attention_forward_kernel,
        (num_programs(walk, num_heads, blocking, blocks.per_multiprocessor),),
        lse,
        *(head.rows(q), head.rows(k), head.rows(v), head.rows(out)),
        *head.descriptors((k, v), blocking.other, wanted=described),
        *(walk, boxes, scale * _LOG2E, num_tokens, num_heads, walk.order.shape[0]),
        HEAD=head,
        BLOCKING=blocking,
        **blocks.options(),
    )
    return out, lse


class Keys(NamedTuple):
    """What is walked over: k and v, and their descriptors (of None where there are none)."""

    k: Any
    v: Any
    k_blocks: Any
    v_blocks: Any


class Softmax(NamedTuple):
    """Sums of an online softmax. top: the largest score so far, not scaled; total: of weights relative to it."""

    acc: Any
    total: Any
    top: Any


@triton.jit
def packed_attention_forward_kernel(
    lse,
    q,
    k,
    v,
    out,
    k_main,  # descriptors
    k_rest,
    v_main,
    v_rest,
    walk,
    boxes,
    scale,  # times log2 e
    num_tokens,
    num_heads,
    num_tiles,
    HEAD: tl.constexpr,
    BLOCKING: tl.constexpr,
):
    keys = Keys(k, v, Block(k_main, k_rest), Block(v_main, v_rest))
    _clear_padding(lse, out, walk, num_tokens, num_heads, num_tiles, HEAD, BLOCKING)
    slots = count_slots(walk, num_tiles, BLOCKING)
    for step in tl.range(0, tl.cdiv(slots * num_heads, tl.num_programs(0)), disable_licm=True):
        item = item_of(step)
        if item < slots * num_heads:
            slot, head = slot_and_head(item, slots, num_heads)
            tile, own = own_block(walk, slot, head, BLOCKING)
            if own.start < own.stop:
                _attend(
                    lse + head.to(tl.int64) * num_tokens, q, out, keys, walk, boxes, tile, own, scale, HEAD, BLOCKING
                )


@triton.jit
def _clear_padding(lse, out, walk, num_tokens, num_heads, num_tiles, HEAD: tl.constexpr, BLOCKING: tl.constexpr):
    first, blocks = padding_blocks(walk, num_tiles, num_tokens, num_heads, BLOCKING)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        head, start = block % num_heads, first + block // num_heads * BLOCKING.own
        tokens = start + tl.arange(0, BLOCKING.own)
        store_block(out, start, head, tokens < num_tokens, zero_block(BLOCKING.own, HEAD), HEAD)
        tl.store(lse + head.to(tl.int64) * num_tokens + tokens, float("-inf"), mask=tokens < num_tokens)


@triton.jit
def _attend(lse, q, out, keys, walk, boxes, tile, own, scale, HEAD: tl.constexpr, BLOCKING: tl.constexpr):
    """The output of one block of queries."""
    BLOCK: tl.constexpr = BLOCKING.own
    tokens, exists = rows_of(own, BLOCKING)
    queries = load_block(q, own.start, own.head, exists, BLOCK, HEAD)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = Softmax(zero_block(BLOCK, HEAD), tl.zeros([BLOCK], tl.float32), top)

    first, last, rest_first, rest_last = split_walk(walk, tile, FROM_END=False, BLOCK=BLOCKING.other)
    whole, asked = Stretch(walk, boxes, first, last), Stretch(walk, boxes, rest_first, rest_last)
    sums = _walk_keys(sums, queries, own, keys, whole, scale, WHOLE if walk.tiles is None else CUT, HEAD, BLOCKING)
    sums = _walk_keys(sums, queries, own, keys, asked, scale, CUT if boxes is None else TESTED, HEAD, BLOCKING)

    # A query that met no key has total 0 and top -inf: output 0, lse -inf.
    total = tl.where(sums.total == 0.0, 1.0, sums.total)
    store_block(out, own.start, own.head, exists, scaled(sums.acc, (1.0 / total)[:, None], HEAD), HEAD)
    tl.store(lse + tokens, (sums.top * scale + tl.log2(total)) * LN2, mask=exists)


@triton.jit
def _walk_keys(
    sums, queries, own, keys, stretch, scale, ASKED: tl.constexpr, HEAD: tl.constexpr, BLOCKING: tl.constexpr
):
    """Online softmax over a stretch of the walk."""
    box = None
    if ASKED == TESTED:
        tokens, valid = rows_of(own, BLOCKING)
        box = load_boxes(stretch.boxes, tokens, valid, 1, BLOCKING)
    if ASKED == CUT and BLOCKING.described:
        if stretch.first < stretch.last:
            bounds = stretch.first, stretch.last
            sums = _meet(sums, queries, own, keys, bounds, box, stretch.boxes, scale, ASKED, HEAD, BLOCKING)
    else:
        for step in range(0, count_blocks(stretch, BLOCKING)):
            bounds = block_bounds(stretch, step, BLOCKING)
            sums = _meet(sums, queries, own, keys, bounds, box, stretch.boxes, scale, ASKED, HEAD, BLOCKING)
    return sums


@triton.jit
def _meet(
    sums, queries, own, keys, bounds, box, boxes, scale,
    ASKED: tl.constexpr, HEAD: tl.constexpr, BLOCKING: tl.constexpr,
):  # fmt: skip
    """One block of keys more. bounds: its first token, and where those end that it may hold."""
    BLOCK: tl.constexpr = BLOCKING.other
    head = own.head // HEAD.group
    key, stop = bounds
    tokens = key + tl.arange(0, BLOCK)
    exists = None if ASKED == WHOLE else tokens < stop
    # Whatever stands in keys that do not exist, their scores are replaced.
    k = load_next(keys.k, keys.k_blocks, key, head, exists if keys.k_blocks.main is None else None, BLOCK, HEAD)
    scores = products(queries, k, HEAD)
    if ASKED == TESTED:
        place = load_places(boxes, tokens, exists, 0, BLOCKING)
        scores = tl.where(is_allowed(box, place, BLOCKING), scores, float("-inf"))
    elif ASKED != WHOLE:  # noqa: SIM102
        if key + BLOCK > stop:
            scores = tl.where(exists[None, :], scores, float("-inf"))

    top = tl.maximum(sums.top, tl.max(scores, 1))
    # Rows that have met no key yet: -inf - -inf would be NaN.
    finite = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(scores * scale - (finite * scale)[:, None])
    rescale = tl.exp2((sums.top - finite) * scale)
    total = sums.total * rescale + tl.sum(weights, 1)
    v = load_next(keys.v, keys.v_blocks, key, head, exists, BLOCK, HEAD)
    acc = scaled(sums.acc, rescale[:, None], HEAD)
    return Softmax(add_products(acc, weights.to(v.main.dtype), v, HEAD), total, top)
