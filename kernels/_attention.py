"""What the forward and the backward kernels of packed attention share.

A program owns a block of one tile (queries in the forward and the dQ pass, keys otherwise) and walks over the tiles
that its tile meets in **one flat loop** over (tile, block of the tile): a loop nested in each tile would drain the
software pipeline at every tile. Where all that a tile meets lies side by side (a full mask; a causal one in raster
order), the walk steps through those tokens without asking for a tile at all.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._launch import next_power_of_two
from sora_fast.schedule import GUARD

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
_GUARD = tl.constexpr(GUARD)

# What the blocks of a stretch of a walk must be asked for: nothing, where they exist and are met entirely; which of
# their tokens exist, where a tile or the segment may end within; or every pair. A range of tokens is WHOLE but for
# what is left beside whole blocks (CUT under a full mask, else TESTED); tiles in a list are met entirely (CUT) or not.
# Blocks that are asked nothing leave 370 instructions of 520 in the forward's loop, 308 of 436 in dQ's, 281 of 344 in
# that of dK and dV (sm_90, head dim 128). Listed tiles: 470, as the compiler selects rather than branches.
WHOLE, CUT, TESTED = (tl.constexpr(kind) for kind in range(3))


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
    """What a partial pair of tiles is tested with: packed coordinates (see `TileSchedule`) and raster places, [N]."""

    low: Tensor
    high: Tensor
    place: Tensor
    raster: Tensor


# Rows of the largest block that a launch configuration may ask for.
_LONGEST_BLOCK = 128


class Rows(NamedTuple):
    """A tensor [N, H, D] of any strides, for a kernel; made by `Head.rows`."""

    data: Tensor
    token_stride: int
    head_stride: int
    dim_stride: int


@dataclass(frozen=True)
class Head:
    """How the kernels read a head's rows; a compile-time constant.

    main, rest: powers of two, at least 16, that cover the head dim `dim` together; rest is 0 if main does alone.
    group: neighbouring query heads that share a head of keys and values.
    unit: strides of tokens and heads are passed in units of so many elements. Triton knows of an integer only whether
        16 divides it: passed as it is, a head stride of 72 would cost the 16-byte loads.
    wide: a block's rows lie 2³¹ elements or more apart. (Else 32 bits within a block save the registers that make the
        difference between spilling and not on sm_80. Blocks start at 64-bit offsets in any case.)
    """

    dim: int
    main: int
    rest: int
    group: int
    unit: int
    wide: bool

    @staticmethod
    def of(q: Tensor, k: Tensor, *others: Tensor) -> "Head":
        """For queries, keys and all others that a kernel touches: [N, H, D] of any strides."""
        tensors = (q, k, *others)
        strides = [x.stride(axis) for x in tensors for axis in (0, 1)]
        unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
        reach = max(_LONGEST_BLOCK * x.stride(0) + x.shape[2] * x.stride(2) for x in tensors)
        dim = q.shape[2]
        return Head(dim, *split_head_dim(dim), q.shape[1] // k.shape[1], unit, reach >= 1 << 31)

    def rows(self, x: Tensor) -> Rows:
        """x [N, H, D] as a kernel takes it."""
        return Rows(x, x.stride(0) // self.unit, x.stride(1) // self.unit, x.stride(2))


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """`Head.main` and `Head.rest`: 72 = 64 + 16 (8 of them masked) takes 80 columns, the next power of two 128.

    So are 40 and 48 (32 + 16), 80 (64 + 16), 88 and 96 (64 + 32), 136 and 144 (128 + 16), 152 and 160 (128 + 32), 168
    to 192 (128 + 64). For 56, 104 to 120 and 200 to 248 the rest would be as wide as the main part: one block of 64,
    128, 256. (A third part, 112 columns for 104, would be one more load and product of each.)
    """
    whole = max(next_power_of_two(head_dim), 16)
    main = max(whole // 2, 16)
    rest = max(next_power_of_two(head_dim - main), 16)
    return (main, rest) if rest < main < head_dim else (whole, 0)


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: exactly, unless the user lets PyTorch use TF32."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def _pointers(x, token, head, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """[ROWS, WIDTH]: to the columns from FIRST on of the rows from `token` on."""
    start = x.data + (token.to(tl.int64) * x.token_stride + head.to(tl.int64) * x.head_stride) * HEAD.unit
    rows = tl.arange(0, ROWS)
    cols = FIRST + tl.arange(0, WIDTH)
    if HEAD.wide:
        rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    return start + (rows * x.token_stride * HEAD.unit)[:, None] + (cols * x.dim_stride)[None, :]


@triton.jit
def _columns(FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    return (FIRST + tl.arange(0, WIDTH) < HEAD.dim)[None, :]


@triton.jit
def _within(exists, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    """Mask of the rows and columns that exist. exists: which rows do."""
    mask = exists[:, None]
    if HEAD.dim < FIRST + WIDTH:
        mask = mask & _columns(FIRST, WIDTH, HEAD)
    return mask


@triton.jit
def _load(x, token, head, exists, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """exists: None if all rows do."""
    pointers = _pointers(x, token, head, FIRST, WIDTH, ROWS, HEAD)
    if exists is not None:
        block = tl.load(pointers, mask=_within(exists, FIRST, WIDTH, HEAD), other=0.0)
    elif HEAD.dim < FIRST + WIDTH:
        block = tl.load(pointers, mask=_columns(FIRST, WIDTH, HEAD), other=0.0)
    else:
        block = tl.load(pointers)
    return block


@triton.jit
def load_main(x, token, head, exists, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """The first `HEAD.main` columns of the rows from `token` on; zeros where a row does not exist (0 · NaN is NaN)."""
    return _load(x, token, head, exists, 0, HEAD.main, ROWS, HEAD)


@triton.jit
def load_rest(x, token, head, exists, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """The columns past `HEAD.main`; only where `HEAD.rest` is not 0."""
    return _load(x, token, head, exists, HEAD.main, HEAD.rest, ROWS, HEAD)


@triton.jit
def store_rows(x, token, head, exists, main, rest, HEAD: tl.constexpr):
    """Store a block given as its main columns [rows, HEAD.main] and, if there is one, its rest [rows, HEAD.rest]."""
    ROWS: tl.constexpr = main.shape[0]
    pointers = _pointers(x, token, head, 0, HEAD.main, ROWS, HEAD)
    tl.store(pointers, main.to(x.data.dtype.element_ty), mask=_within(exists, 0, HEAD.main, HEAD))
    if HEAD.rest:
        pointers = _pointers(x, token, head, HEAD.main, HEAD.rest, ROWS, HEAD)
        tl.store(pointers, rest.to(x.data.dtype.element_ty), mask=_within(exists, HEAD.main, HEAD.rest, HEAD))


@triton.jit
def add_rows(x, token, head, exists, main, rest, HEAD: tl.constexpr):
    """Add a block, given as for `store_rows`, to what stands there, by atomics: in no fixed order."""
    ROWS: tl.constexpr = main.shape[0]
    _add(x, token, head, exists, main, 0, ROWS, HEAD)
    if HEAD.rest:
        _add(x, token, head, exists, rest, HEAD.main, ROWS, HEAD)


@triton.jit
def _add(x, token, head, exists, block, FIRST: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr):
    WIDTH: tl.constexpr = block.shape[1]
    pointers = _pointers(x, token, head, FIRST, WIDTH, ROWS, HEAD)
    if exists is not None:
        tl.atomic_add(pointers, block, mask=_within(exists, FIRST, WIDTH, HEAD), sem="relaxed")
    elif HEAD.dim < FIRST + WIDTH:
        tl.atomic_add(pointers, block, mask=_columns(FIRST, WIDTH, HEAD), sem="relaxed")
    else:
        tl.atomic_add(pointers, block, sem="relaxed")


@triton.jit
def load_numbers(data, place, exists, other):
    """One number a row; `other` where a row does not exist; exists None: all do."""
    return tl.load(data + place) if exists is None else tl.load(data + place, mask=exists, other=other)


@triton.jit
def zero_block(ROWS: tl.constexpr, HEAD: tl.constexpr):
    """Accumulators for the main and the rest columns. Without a rest, the second is never used and costs nothing."""
    main: tl.constexpr = HEAD.main
    rest: tl.constexpr = HEAD.rest if HEAD.rest else 16
    return tl.zeros([ROWS, main], tl.float32), tl.zeros([ROWS, rest], tl.float32)


@triton.jit
def own_block(walk, slot, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The tile of a program, the first token of its block, and the end of the tile. A block may be empty."""
    tile = tl.load(walk.order + slot // PARTS)
    start = tl.load(walk.own + tile) + slot % PARTS * BLOCK
    return tile, start, tl.load(walk.own + tile + 1)


@triton.jit
def padding_bounds(walk, slot, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Every program clears its share of the padding: the blocks from the first bound on, in steps of the second.

    That is at most one block where tiles of about this size cover the capacity.
    """
    programs = tl.num_programs(0)
    return tl.load(walk.own + programs // PARTS) + slot * BLOCK, programs * BLOCK


@triton.jit
def stretches(walk, tile, FROM_END: tl.constexpr, BLOCK: tl.constexpr):
    """Two stretches, each as first and last: what `tile` meets entirely, and the rest, which is to be asked.

    Of a list, places in `walk.tiles`. Of a range, tokens: as many whole blocks as fit in the part that is met entirely,
    which is the range's first or, FROM_END, its last one.
    """
    begin, split, end = tl.load(walk.begin + tile), tl.load(walk.split + tile), tl.load(walk.end + tile)
    if walk.tiles is None:
        split = end - (end - split) // BLOCK * BLOCK if FROM_END else begin + (split - begin) // BLOCK * BLOCK
    return (split, end, begin, split) if walk.tiles is None and FROM_END else (begin, split, split, end)


@triton.jit
def count_blocks(walk, first, last, BLOCKS_PER_TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks in a stretch."""
    return tl.cdiv(last - first, BLOCK) if walk.tiles is None else (last - first) * BLOCKS_PER_TILE


@triton.jit
def block_bounds(walk, first, last, step, BLOCKS_PER_TILE: tl.constexpr, BLOCK: tl.constexpr):
    """First token of block number `step` of a stretch, and where the tokens end that it may hold."""
    start, stop = first + step * BLOCK, last
    if walk.tiles is not None:
        tile = tl.load(walk.tiles + first + step // BLOCKS_PER_TILE)
        start = tl.load(walk.other + tile) + step % BLOCKS_PER_TILE * BLOCK
        stop = tl.load(walk.other + tile + 1)
    return start, stop


@triton.jit
def load_boxes(boxes, query, exists, CAUSAL: tl.constexpr):
    """First and last packed coordinate of the boxes of queries, and their raster places."""
    low = tl.load(boxes.low + query, mask=exists, other=0)
    high = tl.load(boxes.high + query, mask=exists, other=0)
    raster = tl.load(boxes.raster + query, mask=exists, other=0) if CAUSAL else low
    return low, high, raster


@triton.jit
def load_places(boxes, key, exists, CAUSAL: tl.constexpr):
    """Packed coordinates of keys (0, which lies in no box, where there is none), and their raster places."""
    place = tl.load(boxes.place + key, mask=exists, other=0)
    raster = tl.load(boxes.raster + key, mask=exists, other=0) if CAUSAL else place
    return place, raster


@triton.jit
def is_allowed(low, high, query_raster, place, key_raster, CAUSAL: tl.constexpr):
    """True where a key's packed coordinates lie in a query's box (see `TileSchedule`) and, if CAUSAL, not after it."""
    inside = ((place | _GUARD) - low) & ((high | _GUARD) - place) & _GUARD
    allowed = inside == _GUARD
    if CAUSAL:
        allowed = allowed & (key_raster <= query_raster)
    return allowed
