"""Packed attention, backward, in either of two forms.

With P the attention weights, dS = P · (dO Vᵀ − delta), delta = rowsum(dO · O) − dlse: dV = Pᵀ dO, dQ = scale · dS K,
dK = scale · dSᵀ Q.

In two passes: dQ by blocks of queries, then dK and dV by blocks of keys; every gradient is the sum of one program in a
fixed order, equal bits in every run. In one pass: by blocks of keys, which add their share of dQ to fp32 sums by
atomics: five products of matrices instead of seven, but the order of the sums is whatever the GPU makes it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._attention_config import BlockSizes, block_sizes, is_one_pass_faster
from sora_fast.kernels._attention_operands import (
    Block,
    Head,
    add_block,
    add_products,
    describable,
    load_block,
    load_next,
    load_numbers,
    products,
    row_products,
    scaled,
    store_block,
    zero_block,
)
from sora_fast.kernels._attention_walk import (
    CUT,
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
from sora_fast.kernels._launch import cdiv, launch, target_arch


class Statistics(NamedTuple):
    """Of every query, [H, N] float32: base-2 logsumexp (+inf of one that met no key), and delta."""

    lse: Tensor
    delta: Tensor


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

    def blocks(self, kernel: str, walk: Walk) -> BlockSizes:
        """The configuration of one of the passes, which follows `walk`."""
        arch = target_arch(self.q.device)
        return block_sizes(kernel, self.q.dtype, self.q.shape[2], arch, mask_kind(walk, self.boxes))

    def describes(self, walk: Walk, *operands: Tensor) -> bool:
        """Whether what is walked over can be read by descriptors."""
        return walk.tiles is None and describable(target_arch(self.q.device), *operands)

    def numbers(self, walk: Walk, heads: int) -> tuple[Any, ...]:
        """What every kernel takes last but its constants."""
        sizes = self.q.shape[0], self.k.shape[0], heads, walk.order.shape[0]
        return walk, self.boxes, self.scale * LOG2E.value, self.scale, *sizes


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
    statistics = Statistics(torch.empty_like(lse), torch.empty_like(lse))
    if keys and not deterministic and is_one_pass_faster(q.shape[2], target_arch(q.device)):
        sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        _launch_statistics(problem, statistics)
        _launch_grad_key_value(problem, statistics, grad_k, grad_v, sums)
        return [torch.mul(sums, scale, out=grad_q), grad_k, grad_v]
    _launch_grad_query(problem, statistics, grad_q)
    if not keys:
        return [grad_q]
    _launch_grad_key_value(problem, statistics, grad_k, grad_v, None)
    return [grad_q, grad_k, grad_v]


# Rows of a block of the kernel that reads two rows of a head and writes two numbers. On sm_100 64 spill 48 bytes a
# thread at head dim 192, and 32 spill 8 at 256.
STATISTICS_BLOCK = 16


def _launch_grad_query(p: _Problem, statistics: Statistics, grad_q: Tensor) -> None:
    """The first of the two passes; it fills `statistics` for the second."""
    head, walk, heads = Head.of(p.q, p.k, p.v, p.out, p.grad_out, grad_q), p.by_query, p.q.shape[1]
    blocks = p.blocks("grad_query", walk)
    described = p.describes(walk, p.k, p.v)
    blocking = blocks.blocking(*p.tile_sizes, causal=p.causal, described=described)
    launch(
        packed_attention_grad_query_kernel,
        (num_programs(walk, heads, blocking, blocks.per_multiprocessor),),
        *(p.lse, p.grad_lse, statistics),
        *(head.rows(x) for x in (p.q, p.k, p.v, p.out, p.grad_out, grad_q)),
        *head.descriptors((p.k, p.v), blocking.other, wanted=described),
        *p.numbers(walk, heads),
        HEAD=head,
        BLOCKING=blocking,
        **blocks.options(),
    )


def _launch_statistics(p: _Problem, statistics: Statistics) -> None:
    """What the one pass needs beforehand."""
    head = Head.of(p.out, p.out, p.grad_out)
    launch(
        packed_attention_statistics_kernel,
        (cdiv(p.out.shape[0], STATISTICS_BLOCK), p.out.shape[1]),
        *(p.lse, p.grad_lse, statistics, head.rows(p.out), head.rows(p.grad_out), p.out.shape[0]),
        HEAD=head,
        BLOCK=STATISTICS_BLOCK,
        num_warps=4,
    )


def _launch_grad_key_value(
    p: _Problem, statistics: Statistics, grad_k: Tensor, grad_v: Tensor, query_sums: Tensor | None
) -> None:
    """dK and dV; query_sums [N, H, D] float32: add dQ / scale to it, in no fixed order."""
    more = () if query_sums is None else (query_sums,)
    head, walk, heads = Head.of(p.q, p.k, p.v, p.grad_out, grad_k, grad_v, *more), p.by_key, p.k.shape[1]
    blocks = p.blocks("one_pass" if more else "grad_key_value", walk)
    described = p.describes(walk, p.q, p.grad_out)
    blocking = blocks.blocking(*reversed(p.tile_sizes), causal=p.causal, described=described)
    launch(
        packed_attention_grad_key_value_kernel,
        (num_programs(walk, heads, blocking, blocks.per_multiprocessor),),
        *statistics,
        *(head.rows(x) for x in (p.q, p.k, p.v, p.grad_out, grad_k, grad_v)),
        head.rows(query_sums) if more else None,
        *head.descriptors((p.q, p.grad_out), blocking.other, wanted=described),
        *p.numbers(walk, heads),
        HEAD=head,
        BLOCKING=blocking,
        **blocks.options(),
    )


@triton.jit
def packed_attention_statistics_kernel(
    lse,
    grad_lse,
    statistics,
    out,
    grad_out,
    num_tokens,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    tokens = start + tl.arange(0, BLOCK)
    exists = tokens < num_tokens
    do = load_block(grad_out, start, head, exists, BLOCK, HEAD)
    o = load_block(out, start, head, exists, BLOCK, HEAD)
    _find_statistics(do, o, lse, grad_lse, statistics, tokens, exists, head, num_tokens, HEAD)


@triton.jit
def _find_statistics(do, o, lse, grad_lse, statistics, tokens, exists, head, num_tokens, HEAD: tl.constexpr):
    """Base-2 logsumexp and delta of some queries, which it stores, too."""
    place = head.to(tl.int64) * num_tokens + tokens
    row_lse = tl.load(lse + place, mask=exists, other=float("inf"))
    # A query that met no key: +inf makes every weight zero.
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)
    row_delta = row_products(do, o, HEAD)
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + place, mask=exists, other=0.0)
    tl.store(statistics.lse + place, row_lse, mask=exists)
    tl.store(statistics.delta + place, row_delta, mask=exists)
    return row_lse, row_delta


class Keys(NamedTuple):
    """k and v: in memory, with their descriptors (of None where there are none), or blocks of them, without."""

    k: Any
    v: Any
    k_blocks: Any
    v_blocks: Any


class OwnQueries(NamedTuple):
    """A block of queries on chip, the gradients of their outputs, and of each base-2 logsumexp and delta."""

    q: Any
    do: Any
    lse: Any
    delta: Any


class Queries(NamedTuple):
    """What the other passes walk over, and the descriptors of it (of None where there are none).

    lse, delta: base-2 logsumexp and delta, [H, num_tokens]. sums: of dQ, or None.
    """

    q: Any
    do: Any
    q_blocks: Any
    do_blocks: Any
    lse: Any
    delta: Any
    num_tokens: Any
    sums: Any


@triton.jit
def packed_attention_grad_query_kernel(
    lse,
    grad_lse,
    statistics,
    q,
    k,
    v,
    out,
    grad_out,
    grad_q,
    k_main,  # descriptors
    k_rest,
    v_main,
    v_rest,
    walk,
    boxes,
    scale_log2,
    scale,
    num_queries,
    num_keys,
    num_heads,
    num_tiles,
    HEAD: tl.constexpr,
    BLOCKING: tl.constexpr,
):
    """dQ, and on the way the statistics for the other pass."""
    first, blocks = padding_blocks(walk, num_tiles, num_queries, num_heads, BLOCKING)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        start = first + block // num_heads * BLOCKING.own
        padding = start + tl.arange(0, BLOCKING.own) < num_queries
        store_block(grad_q, start, block % num_heads, padding, zero_block(BLOCKING.own, HEAD), HEAD)

    keys = Keys(k, v, Block(k_main, k_rest), Block(v_main, v_rest))
    slots = count_slots(walk, num_tiles, BLOCKING)
    for step in tl.range(0, tl.cdiv(slots * num_heads, tl.num_programs(0)), disable_licm=True):
        item = item_of(step)
        if item < slots * num_heads:
            slot, head = slot_and_head(item, slots, num_heads)
            tile, own = own_block(walk, slot, head, BLOCKING)
            if own.start < own.stop:
                tokens, exists = rows_of(own, BLOCKING)
                do = load_block(grad_out, own.start, head, exists, BLOCKING.own, HEAD)
                o = load_block(out, own.start, head, exists, BLOCKING.own, HEAD)
                row_lse, row_delta = _find_statistics(
                    do, o, lse, grad_lse, statistics, tokens, exists, head, num_queries, HEAD
                )
                queries = OwnQueries(load_block(q, own.start, head, exists, BLOCKING.own, HEAD), do, row_lse, row_delta)
                sums = zero_block(BLOCKING.own, HEAD)
                first, last, rest_first, rest_last = split_walk(walk, tile, FROM_END=False, BLOCK=BLOCKING.other)
                whole, asked = Stretch(walk, boxes, first, last), Stretch(walk, boxes, rest_first, rest_last)
                sums = _walk_keys(
                    sums, queries, own, keys, whole, scale_log2, WHOLE if walk.tiles is None else CUT, HEAD, BLOCKING
                )
                sums = _walk_keys(
                    sums, queries, own, keys, asked, scale_log2, CUT if boxes is None else TESTED, HEAD, BLOCKING
                )
                store_block(grad_q, own.start, head, exists, scaled(sums, scale, HEAD), HEAD)


@triton.jit
def _walk_keys(
    sums, queries, own, keys, stretch, scale_log2, ASKED: tl.constexpr, HEAD: tl.constexpr, BLOCKING: tl.constexpr
):
    """Sum dS K over a stretch of the walk."""
    box = None
    if ASKED == TESTED:
        tokens, valid = rows_of(own, BLOCKING)
        box = load_boxes(stretch.boxes, tokens, valid, 1, BLOCKING)
    if ASKED == CUT and BLOCKING.described:
        if stretch.first < stretch.last:
            bounds = stretch.first, stretch.last
            sums = _meet_keys(sums, queries, own, keys, bounds, box, stretch.boxes, scale_log2, ASKED, HEAD, BLOCKING)
    else:
        for step in range(0, count_blocks(stretch, BLOCKING)):
            bounds = block_bounds(stretch, step, BLOCKING)
            sums = _meet_keys(sums, queries, own, keys, bounds, box, stretch.boxes, scale_log2, ASKED, HEAD, BLOCKING)
    return sums


@triton.jit
def _meet_keys(
    sums, queries, own, keys, bounds, box, boxes, scale_log2,
    ASKED: tl.constexpr, HEAD: tl.constexpr, BLOCKING: tl.constexpr,
):  # fmt: skip
    """One block of keys more. bounds: its first token, and where those end that it may hold."""
    BLOCK: tl.constexpr = BLOCKING.other
    head = own.head // HEAD.group
    key, stop = bounds
    tokens = key + tl.arange(0, BLOCK)
    exists = None if ASKED == WHOLE else tokens < stop
    k = load_next(keys.k, keys.k_blocks, key, head, exists, BLOCK, HEAD)
    v = load_next(keys.v, keys.v_blocks, key, head, exists, BLOCK, HEAD)
    weights = tl.exp2(products(queries.q, k, HEAD) * scale_log2 - queries.lse[:, None])
    slopes = products(queries.do, v, HEAD)
    if ASKED == TESTED:
        place = load_places(boxes, tokens, exists, 0, BLOCKING)
        weights = tl.where(is_allowed(box, place, BLOCKING), weights, 0.0)
    elif ASKED != WHOLE:  # noqa: SIM102
        if key + BLOCK > stop:
            weights = tl.where(exists[None, :], weights, 0.0)
    slopes = (weights * (slopes - queries.delta[:, None])).to(k.main.dtype)
    return add_products(sums, slopes, k, HEAD)


class KeySums(NamedTuple):
    """Sums over queries: dK / scale and dV of a block of keys."""

    dk: Any
    dv: Any


@triton.jit
def packed_attention_grad_key_value_kernel(
    row_lse,
    row_delta,
    q,
    k,
    v,
    grad_out,
    grad_k,
    grad_v,
    query_sums,
    q_main,  # descriptors
    q_rest,
    do_main,
    do_rest,
    walk,
    boxes,
    scale_log2,
    scale,
    num_queries,
    num_keys,
    num_heads,
    num_tiles,
    HEAD: tl.constexpr,
    BLOCKING: tl.constexpr,
):
    """dK and dV, and where `query_sums` is given, dQ / scale into it."""
    first, blocks = padding_blocks(walk, num_tiles, num_keys, num_heads, BLOCKING)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        head, start = block % num_heads, first + block // num_heads * BLOCKING.own
        padding = start + tl.arange(0, BLOCKING.own) < num_keys
        store_block(grad_k, start, head, padding, zero_block(BLOCKING.own, HEAD), HEAD)
        store_block(grad_v, start, head, padding, zero_block(BLOCKING.own, HEAD), HEAD)

    blocks = Block(q_main, q_rest), Block(do_main, do_rest)
    queries = Queries(q, grad_out, *blocks, row_lse, row_delta, num_queries, query_sums)
    slots = count_slots(walk, num_tiles, BLOCKING)
    for step in tl.range(0, tl.cdiv(slots * num_heads, tl.num_programs(0)), disable_licm=True):
        item = item_of(step)
        if item < slots * num_heads:
            slot, head = slot_and_head(item, slots, num_heads)
            tile, own = own_block(walk, slot, head, BLOCKING)
            if own.start < own.stop:
                _, exists = rows_of(own, BLOCKING)
                keys = Keys(
                    load_block(k, own.start, head, exists, BLOCKING.own, HEAD),
                    load_block(v, own.start, head, exists, BLOCKING.own, HEAD),
                    None,
                    None,
                )
                sums = KeySums(zero_block(BLOCKING.own, HEAD), zero_block(BLOCKING.own, HEAD))
                first, last, rest_first, rest_last = split_walk(walk, tile, FROM_END=True, BLOCK=BLOCKING.other)
                whole, asked = Stretch(walk, boxes, first, last), Stretch(walk, boxes, rest_first, rest_last)
                sums = _walk_queries(
                    sums, keys, own, queries, whole, scale_log2, WHOLE if walk.tiles is None else CUT, HEAD, BLOCKING
                )
                sums = _walk_queries(
                    sums, keys, own, queries, asked, scale_log2, CUT if boxes is None else TESTED, HEAD, BLOCKING
                )
                store_block(grad_k, own.start, head, exists, scaled(sums.dk, scale, HEAD), HEAD)
                store_block(grad_v, own.start, head, exists, sums.dv, HEAD)


@triton.jit
def _walk_queries(
    sums, keys, own, queries, stretch, scale_log2, ASKED: tl.constexpr, HEAD: tl.constexpr, BLOCKING: tl.constexpr
):
    """Sum dSᵀ Q and Pᵀ dO over a stretch of the walk, and the heads of a group."""
    tokens, exists = rows_of(own, BLOCKING)
    place = load_places(stretch.boxes, tokens, exists, 1, BLOCKING) if ASKED == TESTED else None
    if ASKED == CUT and BLOCKING.described:
        if stretch.first < stretch.last:
            bounds = stretch.first, stretch.last
            for member in tl.range(0, HEAD.group, num_stages=1):
                sums = _meet_queries(
                    sums, keys, own, queries, member, bounds, place, stretch.boxes, scale_log2, ASKED, HEAD, BLOCKING
                )
    else:
        for step in range(0, count_blocks(stretch, BLOCKING) * HEAD.group):
            bounds = block_bounds(stretch, step // HEAD.group, BLOCKING)
            member = step % HEAD.group
            sums = _meet_queries(
                sums, keys, own, queries, member, bounds, place, stretch.boxes, scale_log2, ASKED, HEAD, BLOCKING
            )
    return sums


@triton.jit
def _meet_queries(
    sums, keys, own, queries, member, bounds, place, boxes, scale_log2,
    ASKED: tl.constexpr, HEAD: tl.constexpr, BLOCKING: tl.constexpr,
):  # fmt: skip
    """One block of queries more. Scores are transposed: keys × queries.

    Rows of keys that do not exist give numbers that nobody stores; and they may be infinite: dQ must not see them.
    """
    BLOCK: tl.constexpr = BLOCKING.other
    head = own.head * HEAD.group + member
    query, stop = bounds
    tokens = query + tl.arange(0, BLOCK)
    exists = None if ASKED == WHOLE else tokens < stop
    q = load_next(queries.q, queries.q_blocks, query, head, exists, BLOCK, HEAD)
    do = load_next(queries.do, queries.do_blocks, query, head, exists, BLOCK, HEAD)
    scores = products(keys.k, q, HEAD)
    slopes = products(keys.v, do, HEAD)
    row_lse, row_delta = _load_statistics(queries, query, head, exists, BLOCK)
    weights = tl.exp2(scores * scale_log2 - row_lse)
    if ASKED == TESTED:
        box = load_boxes(boxes, tokens, exists, 0, BLOCKING)
        weights = tl.where(is_allowed(box, place, BLOCKING), weights, 0.0)
    slopes = (weights * (slopes - row_delta)).to(q.main.dtype)
    dv = add_products(sums.dv, weights.to(q.main.dtype), do, HEAD)
    dk = add_products(sums.dk, slopes, q, HEAD)
    if queries.sums is not None:
        _, exist = rows_of(own, BLOCKING)
        slopes = tl.where(exist[:, None], slopes, 0.0)
        dq = add_products(zero_block(BLOCK, HEAD), tl.trans(slopes), keys.k, HEAD)
        add_block(queries.sums, query, head, exists, dq, HEAD)
    return KeySums(dk, dv)


@triton.jit
def _load_statistics(queries, query, head, exists, BLOCK: tl.constexpr):
    """Base-2 logsumexp and delta [1, BLOCK] of the queries from `query` on; inf and 0 of what does not exist."""
    place = head.to(tl.int64) * queries.num_tokens + query + tl.arange(0, BLOCK)
    row_lse = load_numbers(queries.lse, place, exists, float("inf"))
    row_delta = load_numbers(queries.delta, place, exists, 0.0)
    return row_lse[None, :], row_delta[None, :]
