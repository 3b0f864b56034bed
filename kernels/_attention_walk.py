"""How the attention kernels divide the work among programs, and which tokens a program meets.

A program owns a block of one tile (an m block: queries, in the forward and the dQ pass; an n block: keys, otherwise)
and walks over the tiles that its tile meets in **one flat loop** over (tile, block of the tile): a loop nested in each
tile would drain the software pipeline at every tile. Where all that a tile meets lies side by side (a full mask; a
causal one in raster order), the walk steps through those tokens without asking for a tile at all.

Programs are persistent: as many as the GPU holds at once, each with a share of the blocks that exist. A pack is laid
out for the most tiles that could be needed, so that of a block a tile half would have nothing to do, but be started.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._launch import num_multiprocessors
from sora_fast.packing.coordinates import GUARD

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
_GUARD = tl.constexpr(GUARD)

# What the blocks of a stretch of a walk must be asked for: nothing, where they exist and are met entirely; which of
# their tokens exist, where a tile or the segment may end within; or every pair. A range of tokens is WHOLE but for
# what is left beside whole blocks (CUT under a full mask, else TESTED); tiles in a list are met entirely (CUT) or not.
# Blocks that are asked nothing leave 345 instructions of 707 in the forward's loop, 286 of 663 in dQ's, 362 of 907 in
# that of dK and dV (sm_90, head dim 128, a frame-causal mask; benchmarks/results/aot.json). Listed tiles: 397 to 461.
WHOLE, CUT, TESTED = (tl.constexpr(kind) for kind in range(3))

# Tiles whose blocks of one head come one after the other before those of the next head: programs that run side by side
# then read the keys of few heads, which stay in the L2 cache.
_NEIGHBOURS = tl.constexpr(16)
# Tiles that are counted at a time.
_COUNTED = tl.constexpr(1024)


class Walk(NamedTuple):
    """Where the tiles lie and what each of this side's tiles meets of the other side.

    own, other [T+1]: tile boundaries (tokens). The rest is a `TileLists` (split: its full_end) or, with tiles None, a
    `TokenRanges`.
    """

    own: Tensor
    other: Tensor
    begin: Tensor
    split: Tensor
    end: Tensor
    order: Tensor
    tiles: Tensor | None = None


class Boxes(NamedTuple):
    """What a partial pair of tiles is tested with: packed coordinates (see `TileSchedule`) and raster places.

    low, high, raster: of queries, [N]; place, key_raster: of keys, [Nk].
    """

    low: Tensor
    high: Tensor
    place: Tensor
    raster: Tensor
    key_raster: Tensor


@dataclass(frozen=True)
class Blocking:
    """How tiles are cut into blocks; a compile-time constant.

    own, other: tokens of a program's block, and of each of those that it walks over. parts, other_parts: such blocks in
    a tile. causal: partial pairs compare raster places too. described: what is walked over is a range of tokens, and
    read by descriptors. What is left of it beside whole blocks, less than one, then needs no loop; without them the
    loop stays, whose loads go straight to shared memory (in registers, they spill up to 1,512 bytes a thread on sm_80).
    """

    own: int
    other: int
    parts: int
    other_parts: int
    causal: bool
    described: bool


class Own(NamedTuple):
    """A program's block: its first token, where its tile ends, and its head."""

    start: Any
    stop: Any
    head: Any


class Stretch(NamedTuple):
    """Part of a walk whose blocks are asked the same: places first … last in `walk.tiles`, or tokens without those."""

    walk: Any
    boxes: Any
    first: Any
    last: Any


def mask_kind(walk: Walk, boxes: Boxes | None) -> str:
    """How a launch configuration calls it: "full", "past" (a causal mask in raster order), or "boxes" (any other)."""
    if walk.tiles is not None:
        return "boxes"
    return "full" if boxes is None else "past"


def num_programs(walk: Walk, heads: int, blocking: Blocking, per_multiprocessor: int) -> int:
    """Of a persistent launch: as many as run at once, but no more than there could be blocks."""
    return min(num_multiprocessors(walk.own.device) * per_multiprocessor, walk.order.shape[0] * blocking.parts * heads)


@triton.jit
def count_slots(walk, num_tiles, BLOCKING: tl.constexpr):
    """Blocks of a head that hold a token; their tiles are the first in `walk.order`. (Some of a tile may be empty.)"""
    used = 0
    for first in range(0, num_tiles, _COUNTED):
        tiles = first + tl.arange(0, _COUNTED)
        begin = tl.load(walk.own + tiles, mask=tiles < num_tiles, other=0)
        end = tl.load(walk.own + tiles + 1, mask=tiles < num_tiles, other=0)
        used += tl.sum((end > begin).to(tl.int32), 0)
    return used * BLOCKING.parts


@triton.jit
def item_of(step):
    """Number `step` of this program's share of a list of items, the longest first.

    They are dealt to one program after the other and then back, so that each gets about as much as the others.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    return step * programs + (program if step % 2 == 0 else programs - 1 - program)


@triton.jit
def slot_and_head(item, slots, heads):
    """Of the items of all heads: `_NEIGHBOURS` slots of one head, the same slots of the next head, and so on."""
    first = item // (_NEIGHBOURS * heads) * _NEIGHBOURS
    count = tl.minimum(slots - first, _NEIGHBOURS)
    within = item - first * heads
    return first + within % count, within // count


@triton.jit
def own_block(walk, slot, head, BLOCKING: tl.constexpr):
    """The tile of a slot, and its block there. A block may be empty."""
    tile = tl.load(walk.order + slot // BLOCKING.parts)
    start = tl.load(walk.own + tile) + slot % BLOCKING.parts * BLOCKING.own
    return tile, Own(start, tl.load(walk.own + tile + 1), head)


@triton.jit
def rows_of(own, BLOCKING: tl.constexpr):
    """Tokens of the program's block, and which of them exist."""
    tokens = own.start + tl.arange(0, BLOCKING.own)
    return tokens, tokens < own.stop


@triton.jit
def padding_blocks(walk, num_tiles, num_tokens, heads, BLOCKING: tl.constexpr):
    """First token of the padding, and the number of blocks, of all heads, in which it is cleared."""
    first = tl.load(walk.own + num_tiles)
    return first, tl.cdiv(num_tokens - first, BLOCKING.own) * heads


@triton.jit
def split_walk(walk, tile, FROM_END: tl.constexpr, BLOCK: tl.constexpr):
    """First and last of two stretches: of what `tile` meets entirely, and of the rest, which is to be asked.

    Of a range of tokens, as many whole blocks as fit in the part that is met entirely, which is the range's first or,
    FROM_END, its last one.
    """
    begin, split, end = tl.load(walk.begin + tile), tl.load(walk.split + tile), tl.load(walk.end + tile)
    if walk.tiles is None:
        split = end - (end - split) // BLOCK * BLOCK if FROM_END else begin + (split - begin) // BLOCK * BLOCK
    return (split, end, begin, split) if walk.tiles is None and FROM_END else (begin, split, split, end)


@triton.jit
def count_blocks(stretch, BLOCKING: tl.constexpr):
    """Blocks in a stretch."""
    length = stretch.last - stretch.first
    return tl.cdiv(length, BLOCKING.other) if stretch.walk.tiles is None else length * BLOCKING.other_parts


@triton.jit
def block_bounds(stretch, step, BLOCKING: tl.constexpr):
    """First token of block number `step` of a stretch, and where the tokens end that it may hold."""
    start, stop = stretch.first + step * BLOCKING.other, stretch.last
    if stretch.walk.tiles is not None:
        tile = tl.load(stretch.walk.tiles + stretch.first + step // BLOCKING.other_parts)
        start = tl.load(stretch.walk.other + tile) + step % BLOCKING.other_parts * BLOCKING.other
        stop = tl.load(stretch.walk.other + tile + 1)
    return start, stop


class Box(NamedTuple):
    """First and last packed coordinate that a query may attend, and its raster place."""

    low: Any
    high: Any
    raster: Any


class Place(NamedTuple):
    """Packed coordinates of a key, and its raster place."""

    place: Any
    raster: Any


@triton.jit
def load_boxes(boxes, query, exists, AXIS: tl.constexpr, BLOCKING: tl.constexpr):
    """Those of some queries, along the other axis than AXIS of a block of pairs."""
    low = tl.expand_dims(tl.load(boxes.low + query, mask=exists, other=0), AXIS)
    high = tl.expand_dims(tl.load(boxes.high + query, mask=exists, other=0), AXIS)
    raster = low
    if BLOCKING.causal:
        raster = tl.expand_dims(tl.load(boxes.raster + query, mask=exists, other=0), AXIS)
    return Box(low, high, raster)


@triton.jit
def load_places(boxes, key, exists, AXIS: tl.constexpr, BLOCKING: tl.constexpr):
    """Those of some keys (0, which lies in no box, where there is none), along the other axis than AXIS."""
    place = tl.expand_dims(tl.load(boxes.place + key, mask=exists, other=0), AXIS)
    raster = place
    if BLOCKING.causal:
        raster = tl.expand_dims(tl.load(boxes.key_raster + key, mask=exists, other=0), AXIS)
    return Place(place, raster)


@triton.jit
def is_allowed(box, key, BLOCKING: tl.constexpr):
    """True where a key's packed coordinates lie in a query's box (see `TileSchedule`) and, if causal, not after it."""
    inside = ((key.place | _GUARD) - box.low) & ((box.high | _GUARD) - key.place) & _GUARD
    allowed = inside == _GUARD
    if BLOCKING.causal:
        allowed = allowed & (key.raster <= box.raster)
    return allowed
