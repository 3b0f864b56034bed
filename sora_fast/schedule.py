"""TileSchedule: which tiles of the packed sequence meet which, from a layout and a mask, built on the device."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sora_fast.bounds import Bounds, Groups
from sora_fast.masks import SpacetimeMask
from sora_fast.packing._bundle import TensorBundle
from sora_fast.packing.layout import MAX_GRID, PackedLayout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Guard bits above the fields w:9, h:9, t:10 of a packed coordinate.
GUARD = 1 << 9 | 1 << 19 | 1 << 30

# Places in a list, and the tiles after it, are numbered in int32.
_MOST_PAIRS = 1 << 30
# Tokens in a block of FlexAttention.
_FLEX_BLOCK = 128
# Pairs of tiles decided at a time, each of which takes some 60 bytes for that moment.
_CHUNK_PAIRS = 1 << 21


@dataclass(frozen=True, eq=False)
class TileLists(TensorBundle):
    """For every tile, the tiles that it meets: tiles[begin:full_end] entirely, tiles[full_end:end] partly.

    begin, full_end, end [T] int32: places in `tiles`; equal for tiles that meet nothing.
    tiles [E] int32.
    order [T] int32: the tiles by decreasing number of tiles met, so that the longest work starts first.
    """

    begin: Tensor
    full_end: Tensor
    end: Tensor
    tiles: Tensor
    order: Tensor


@dataclass(frozen=True, eq=False)
class TileSchedule(TensorBundle):
    """A mask over a layout, ready for a kernel; built once a batch, shared by all layers, heads and sampling steps.

    by_query: key tiles that each query tile meets; by_key: the transpose.
    query_low, query_high [N] int32: the packed coordinates of the first and last key of each query's box.
    key_place [Nk] int32: the packed coordinate of each key, 0 for padding.
    overflow [] int64: pairs of tiles by which each of the two lists was too short (see `check`).
    cross: whether the keys have a layout of their own.
    Key k lies in query i's box iff (((k | G) − low) & ((high | G) − k) & G) == G, with G = `GUARD`.
    """

    mask: SpacetimeMask
    layout: PackedLayout
    kv_layout: PackedLayout
    by_query: TileLists
    by_key: TileLists
    query_low: Tensor
    query_high: Tensor
    key_place: Tensor
    overflow: Tensor
    cross: bool = False

    @staticmethod
    def build(
        layout: PackedLayout,
        mask: SpacetimeMask | None = None,
        *,
        kv_layout: PackedLayout | None = None,
        max_pairs: int = 1 << 24,
    ) -> "TileSchedule":
        """Decide every pair of tiles by interval arithmetic on their bounding boxes; never waits for the device.

        kv_layout: cross-attention, segment s of `layout` sees all of segment s of `kv_layout`; needs the full mask.
        max_pairs: room for so many pairs of tiles in each of the two lists. The default is enough for any mask over
            4,096 tiles, a pack of about 250k tokens. Tiles that find no room left visit all tiles from the first to
            the last that they meet, testing every pair of tokens from the first gap on: the same result but for the
            order of its sums, later.
            `overflow` says so, and `check` how much room there should be.

        A full mask costs O(T) for T tiles. Any other takes O(T²) time and 8·min(T², max_pairs) bytes, and while it is
        built some 150 MB more, whatever T, and some 300 bytes a token.
        """
        mask = mask or SpacetimeMask.full()
        keys = kv_layout or layout
        _check(layout, mask, kv_layout, max_pairs)
        if mask.is_full:
            by_query, by_key = _segment_lists(layout, keys), _segment_lists(keys, layout)
            overflow = layout.cu_seqlens.new_zeros((), dtype=torch.int64)
        else:
            tiles = Groups.tiles(layout)
            bounds = Bounds.of(tiles, tiles, mask)
            (by_query, pairs), (by_key, _) = (_lists(bounds, max_pairs, by_key=by_key) for by_key in (False, True))
            overflow = (pairs - max_pairs).clamp(min=0)
        boxes = *_packed_bounds(layout, mask), _packed_places(keys)
        return TileSchedule(mask, layout, keys, by_query, by_key, *boxes, overflow, cross=kv_layout is not None)

    @property
    def max_pairs(self) -> int:
        """Room for pairs of tiles in each of the two lists."""
        return self.by_query.tiles.shape[0] - self.kv_layout.max_tiles

    def refresh_(self, layout: PackedLayout, *, kv_layout: PackedLayout | None = None) -> "TileSchedule":
        """Make this the schedule of another batch of the same sizes, in the same memory; never waits for the device.

        For CUDA graphs and compiled steps, whose inputs stay where they are: a graph captured with this schedule then
        computes the new batch. `self.layout` and `self.kv_layout`, the very layouts that `build` was given, take over
        the content of the new ones too (unless those are the same, filled by the caller). Returns itself.

        Raises ValueError if a size or the device differs, or a kv_layout is missing or too many.
        """
        if (kv_layout is not None) != self.cross:
            raise ValueError(
                f"kv_layout: {'missing' if self.cross else 'given'}; the schedule was built "
                f"{'with' if self.cross else 'without'} one"
            )
        if self.cross and (layout is self.kv_layout or kv_layout is self.layout):
            raise ValueError("layout, kv_layout: the schedule's own, exchanged; pass copies")
        _check(layout, self.mask, kv_layout, max_pairs=0)
        batches = (("layout", self.layout, layout), ("kv_layout", self.kv_layout, kv_layout or layout))
        for name, mine, new in batches:
            mine.check_like(name, new)
        for _, mine, new in batches:
            mine.copy_(new)
        keys, room = self.kv_layout if self.cross else None, 0 if self.mask.is_full else self.max_pairs
        self.copy_(TileSchedule.build(self.layout, self.mask, kv_layout=keys, max_pairs=room))
        return self

    def check(self) -> None:
        """Warn, with the room that was needed, if `max_pairs` was too small for this batch: the results are right but
        come later. Waits for the device: look where you wait anyway, where you read the loss for example.
        """
        if missing := int(self.overflow):
            warnings.warn(
                f"TileSchedule: {self.max_pairs + missing} pairs of tiles meet, but max_pairs is {self.max_pairs}; "
                f"some tiles visit more than they must. Build it with max_pairs={self.max_pairs + missing} or more",
                RuntimeWarning,
                stacklevel=2,
            )

    def to_block_mask(self) -> "BlockMask":
        """The same mask for torch.nn.attention.flex_attention, over batch 1 and all heads.

        FlexAttention's blocks are 128 tokens from token 0 on, whatever segments they cut, so the blocks are decided
        anew, by the same arithmetic; its lists take some 16 bytes a pair of blocks. Queries without a key give zeros
        there too, but NaN in the padding is not kept out. Never waits for the device.
        """
        from torch.nn.attention.flex_attention import BlockMask

        queries, keys = (Groups.blocks(layout, _FLEX_BLOCK) for layout in (self.layout, self.kv_layout))
        meets, full = Bounds.of(queries, keys, self.mask).decide(slice(None), slice(None))
        full &= _without_padding(queries)[:, None] & _without_padding(keys)
        return BlockMask.from_kv_blocks(
            *_listed(meets & ~full),
            *_listed(full),
            BLOCK_SIZE=_FLEX_BLOCK,
            mask_mod=_mask_mod(self),
            seq_lengths=(self.layout.capacity, self.kv_layout.capacity),
        )


def _check(layout: PackedLayout, mask: SpacetimeMask, kv_layout: PackedLayout | None, max_pairs: int) -> None:
    if not 0 <= max_pairs <= _MOST_PAIRS:
        raise ValueError(f"max_pairs: {max_pairs}; it must be from 0 to {_MOST_PAIRS}")
    if kv_layout is None:
        return
    if not mask.is_full:
        raise ValueError(f"mask: {mask} with kv_layout; cross-attention takes the full mask only")
    if kv_layout.max_segments != layout.max_segments:
        raise ValueError(
            f"kv_layout: {kv_layout.max_segments} segments, but the layout has {layout.max_segments}; they must agree"
        )
    if kv_layout.device != layout.device:
        raise ValueError(f"kv_layout: on {kv_layout.device}, but the layout is on {layout.device}")


def _segment_lists(layout: PackedLayout, others: PackedLayout) -> TileLists:
    """Full masks need no list: a segment's tiles are contiguous, so `tiles` is the identity."""
    segment, used = _tile_segments(layout)
    # Every segment starts a tile, so its first token finds its first tile exactly.
    first_tile = torch.searchsorted(others.tile_offsets, others.cu_seqlens, out_int32=True)
    begin = torch.where(used, first_tile[segment], 0)
    end = torch.where(used, first_tile[segment + 1], 0)
    tiles = torch.arange(others.max_tiles, dtype=torch.int32, device=others.device)
    return TileLists(begin, end, end, tiles, _longest_first(end - begin))


def _tile_segments(layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """Segment of every tile, int64, and whether the tile is used at all; unused ones get any segment."""
    starts, ends = layout.tile_offsets[:-1], layout.tile_offsets[1:]
    segment = torch.searchsorted(layout.cu_seqlens, starts, right=True) - 1
    return segment.clamp(max=layout.max_segments - 1), ends > starts


def _lists(bounds: Bounds, max_pairs: int, *, by_key: bool) -> tuple[TileLists, Tensor]:
    """The pairs that meet as lists of the query tiles' key tiles, or of the key tiles' query tiles; and their number.

    Decided some tiles at a time, and compacted without waiting for the device.
    """
    count = bounds.key[0].shape[0]
    room = min(count * count, max_pairs)
    # The place past the room takes what is not wanted in a list; in the end all tiles lie there, one after the other.
    tiles = torch.zeros(room + count, dtype=torch.int32, device=bounds.key[0].device)
    taken = tiles.new_zeros((), dtype=torch.int64)
    # Written in place: kept in pieces between the large tensors of every step, they would fragment a CPU's memory.
    places = [tiles.new_empty(count) for _ in range(3)]
    everything = slice(0, count)
    step = max(1, _CHUNK_PAIRS // count)
    for start in range(0, count, step):
        some = slice(start, start + step)
        meets, full = bounds.decide(everything, some) if by_key else bounds.decide(some, everything)
        meets, full = (meets.T, full.T) if by_key else (meets, full)
        for place, part in zip(places, _append(tiles, meets, full, taken, room), strict=True):
            place[some] = part
        taken = taken + meets.sum()
    tiles[room:] = torch.arange(count, dtype=torch.int32, device=tiles.device)
    begin, _, end = places
    return TileLists(*places, tiles, _longest_first(end - begin)), taken


def _append(tiles: Tensor, meets: Tensor, full: Tensor, taken: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """Write the tiles that each row [T] of the matrices meets behind the `taken` places, full ones first.

    Returns begin, full_end, end of the rows. A row that does not fit gets a range of the tiles that lie past `room`.
    """
    columns = torch.arange(meets.shape[1], dtype=torch.int32, device=meets.device)
    counts, full_counts = (matrix.sum(dim=1, dtype=torch.int32) for matrix in (meets, full))
    end = taken + counts.cumsum(0)
    begin = end - counts
    full_end = begin + full_counts
    rank, full_rank = (matrix.cumsum(dim=1, dtype=torch.int32) for matrix in (meets, full))
    rank = torch.where(full, full_rank, full_counts[:, None] + rank - full_rank) - 1
    place = torch.where(meets & (end <= room)[:, None], begin[:, None] + rank, room)
    tiles.scatter_(0, place.flatten(), columns.expand_as(meets).flatten())
    if room >= meets.shape[1] ** 2:
        return begin, full_end, end
    return tuple(
        torch.where(end <= room, place, room + bound)
        for place, bound in zip((begin, full_end, end), _ranges(meets, full, columns), strict=True)
    )


def _ranges(meets: Tensor, full: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row: the first tile that it meets, the first after it that is not full, and the one past the last."""
    count = columns.shape[0]
    first = torch.where(meets, columns, count).amin(dim=1)
    end = torch.maximum(first, torch.where(meets, columns + 1, 0).amax(dim=1))
    gap = torch.where(full | (columns < first[:, None]), count, columns).amin(dim=1)
    return first, torch.minimum(gap, end), end


def _longest_first(counts: Tensor) -> Tensor:
    return torch.sort(counts, descending=True, stable=True)[1].to(torch.int32)


def _packed_places(layout: PackedLayout) -> Tensor:
    places = (layout.coords + 1).unbind(dim=1)
    return torch.where(layout.segment_ids >= 0, _pack(*places), 0)


def _packed_bounds(layout: PackedLayout, mask: SpacetimeMask) -> tuple[Tensor, Tensor]:
    # Coordinates count from 1, so that 0 and limit + 1 stand for "before all" and "after all", and padding keys (0)
    # lie in no box.
    first, last = mask.bounds(layout)
    low = [(first[:, axis] + 1).clamp(1, MAX_GRID[axis] + 1) for axis in range(3)]
    high = [(last[:, axis] + 1).clamp(0, MAX_GRID[axis] + 1) for axis in range(3)]
    return _pack(*low), _pack(*high)


def _pack(t: Tensor, h: Tensor, w: Tensor) -> Tensor:
    return t << 20 | h << 10 | w


def _without_padding(blocks: Groups) -> Tensor:
    ends = torch.arange(1, blocks.count + 1, device=blocks.ids.device) * _FLEX_BLOCK
    return ends <= blocks.layout.cu_seqlens[-1]


def _listed(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """A boolean matrix as FlexAttention wants it: how many columns of each row are true, and first of all which."""
    columns = torch.sort(pairs.to(torch.int8), dim=1, descending=True, stable=True)[1]
    return pairs.sum(dim=1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]


def _mask_mod(schedule: TileSchedule) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    segments, key_segments = schedule.layout.segment_ids, schedule.kv_layout.segment_ids
    low, high, place = schedule.query_low, schedule.query_high, schedule.key_place
    raster = schedule.layout.raster_index if schedule.mask.causal_tokens else None

    def allows(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = ((place[key] | GUARD) - low[query]) & ((high[query] | GUARD) - place[key]) & GUARD
        allowed = (segments[query] == key_segments[key]) & (segments[query] >= 0) & (inside == GUARD)
        return allowed if raster is None else allowed & (raster[key] <= raster[query])

    return allows
