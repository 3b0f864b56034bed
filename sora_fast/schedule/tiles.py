"""What each tile meets, in plain PyTorch: a range of tokens where a mask and an order allow it, else lists of tiles."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.packing._bundle import TensorBundle, may_read
from sora_fast.packing.layout import PackedLayout
from sora_fast.schedule.bounds import Bounds, Groups

# Pairs of tiles decided at a time, each of which takes some 60 bytes for that moment.
_CHUNK_PAIRS = 1 << 21
# Small segments are decided together, up to so many tiles: a step's operators cost as much as 64² pairs do.
_TOGETHER = 64


@dataclass(frozen=True, eq=False)
class TokenRanges(TensorBundle):
    """For every tile, the tokens begin … end that it meets, where those lie side by side; 0, 0 for unused tiles.

    begin, split, end [T] int32. Of a tile of queries the keys begin … split are met by all of its queries, and split …
        end by some; of a tile of keys it is the queries split … end that meet all of its keys.
    order [T] int32: the tiles by decreasing number of tokens met, so that the longest work starts first.
    """

    begin: Tensor
    split: Tensor
    end: Tensor
    order: Tensor


@dataclass(frozen=True, eq=False)
class TileLists(TensorBundle):
    """For every tile, the tiles that it meets: tiles[begin:full_end] entirely, tiles[full_end:end] partly.

    begin, full_end, end [T] int32: places in `tiles`; equal for tiles that meet nothing.
    order [T] int32: the tiles by decreasing number of tiles met.
    tiles [E] int32.
    """

    begin: Tensor
    full_end: Tensor
    end: Tensor
    order: Tensor
    tiles: Tensor


def has_ranges(layout: PackedLayout, mask: SpacetimeMask, *, cross: bool) -> bool:
    """True if the tokens that a tile meets lie side by side: all of a segment, or in raster order all of the past.

    cross: the keys have a layout of their own. There the past has lists, in any order.
    """
    return mask.is_full or (mask.sees_past and layout.is_raster and not cross)


def token_ranges(layout: PackedLayout, others: PackedLayout, mask: SpacetimeMask, *, by_key: bool) -> TokenRanges:
    """For the tiles of `layout`; by_key: they are the keys, and `others` the queries (else the other way round)."""
    starts, stops = layout.tile_offsets[:-1], layout.tile_offsets[1:]
    used = stops > starts
    segment = (torch.searchsorted(layout.cu_seqlens, starts, right=True) - 1).clamp(max=layout.max_segments - 1)
    # No kernel may be led past the capacity by offsets that nobody could check.
    begin, end = (others.cu_seqlens[place].clamp(max=others.capacity) for place in (segment, segment + 1))
    split = begin if by_key else end
    if not mask.is_full:
        moments = _moments(layout, mask)
        first, last = (moments[place.long()] for place in (starts, (stops - 1).clamp(min=0)))
        if by_key:
            begin, split = (_bound(moments, moment) for moment in (first, last))
        else:
            split, end = (_bound(moments, moment, right=True) for moment in (first, last))
    begin, split, end = (torch.where(used, place, 0) for place in (begin, split, end))
    return TokenRanges(begin, split, end, _longest_first(end - begin))


def _moments(layout: PackedLayout, mask: SpacetimeMask) -> Tensor:
    """[N+1] int64, ascending in raster order: a query sees the keys of its segment of the same and earlier moments."""
    places = torch.arange(layout.capacity + 1, device=layout.device)
    if mask.causal_tokens:
        return places
    frames = torch.where(layout.segment_ids >= 0, layout.segment_ids, layout.max_segments).long() << 10
    frames = frames + layout.coords[:, 0]
    return torch.cat([frames, places[:1] + torch.iinfo(torch.int64).max])


def _bound(moments: Tensor, moment: Tensor, *, right: bool = False) -> Tensor:
    return torch.searchsorted(moments, moment, right=right, out_int32=True)


def tile_lists(
    layout: PackedLayout, keys: PackedLayout, mask: SpacetimeMask, max_pairs: int
) -> tuple[TileLists, TileLists, Tensor]:
    """The key tiles of every query tile, the query tiles of every key tile, and the number of pairs that meet."""
    queries = Groups.tiles(layout)
    bounds = Bounds.of(queries, queries if keys is layout else Groups.tiles(keys), mask)
    by_query, pairs = _lists(layout, keys, bounds, max_pairs, by_key=False)
    by_key, _ = _lists(keys, layout, bounds, max_pairs, by_key=True)
    return by_query, by_key, pairs


def _lists(
    own: PackedLayout, other: PackedLayout, bounds: Bounds, max_pairs: int, *, by_key: bool
) -> tuple[TileLists, Tensor]:
    """Decided some tiles at a time, and compacted without waiting for the device. by_key: `own` are the keys."""
    count, num_columns = own.max_tiles, other.max_tiles
    room = list_room(count, num_columns, max_pairs)
    # The place past the room takes what is not wanted in a list; in the end all tiles lie there, one after the other.
    tiles = torch.zeros(room + num_columns, dtype=torch.int32, device=own.device)
    taken = tiles.new_zeros((), dtype=torch.int64)
    # Written in place: kept in pieces between the large tensors of every step, they would fragment a CPU's memory.
    places = [tiles.new_empty(count) for _ in range(3)]
    for rows, columns in _stretches(own, other):
        meets, full = bounds.decide(columns, rows) if by_key else bounds.decide(rows, columns)
        meets, full = (meets.T, full.T) if by_key else (meets, full)
        numbers = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=tiles.device)
        parts = _append(tiles, meets, full, numbers, taken, room)
        if room < count * num_columns:
            parts = _fitted(parts, meets, full, numbers, room, num_columns)
        for place, part in zip(places, parts, strict=True):
            place[rows] = part
        taken = taken + meets.sum()
    tiles[room:] = torch.arange(num_columns, dtype=torch.int32, device=tiles.device)
    begin, _, end = places
    return TileLists(*places, _longest_first(end - begin), tiles), taken


def list_room(rows: int, columns: int, max_pairs: int) -> int:
    """Places in the lists of `rows` tiles before those that hold all `columns` tiles, one after the other."""
    return min(rows * columns, max_pairs)


def _stretches(own: PackedLayout, other: PackedLayout) -> Iterator[tuple[slice, slice]]:
    """All tiles of `own` in their order, some at a time, each time with those of `other` that they may meet, if not
    more: those of the same segments, where the offsets may be read, and all tiles elsewhere.
    """
    bounds, used = [(0, 0), (own.max_tiles, other.max_tiles)], own.max_tiles
    if may_read(own.cu_seqlens):
        firsts = torch.searchsorted(own.tile_offsets, own.cu_seqlens).tolist()
        others = firsts if other is own else torch.searchsorted(other.tile_offsets, other.cu_seqlens).tolist()
        bounds, used = _joined([*zip(firsts, others, strict=True)]), firsts[-1]
    for (first, column), (last, end) in pairwise(bounds):
        # Of rows that have no column, whichever is asked says that they meet nothing.
        columns = slice(column, end) if column < end else slice(0, 1)
        step = max(1, _CHUNK_PAIRS // (columns.stop - columns.start))
        for start in range(first, last, step):
            yield slice(start, min(start + step, last)), columns
    if used < own.max_tiles:
        yield slice(used, own.max_tiles), slice(0, 1)


def _joined(firsts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Bounds, of rows and of columns, of which some are left out: neighbours share a stretch of at most `_TOGETHER`."""
    bounds = firsts[:1]
    for place, following in zip(firsts[1:], [*firsts[2:], None], strict=True):
        far = following is None or max(f - b for f, b in zip(following, bounds[-1], strict=True)) > _TOGETHER
        if place[0] > bounds[-1][0] and far:
            bounds.append(place)
    return bounds


def _append(
    tiles: Tensor, meets: Tensor, full: Tensor, columns: Tensor, taken: Tensor, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the tiles that each row of the matrices meets behind the `taken` places, full ones first.

    columns: which tile each column stands for. Returns begin, full_end, end of the rows; one that ends past the room is
    not written.
    """
    counts, full_counts = (matrix.sum(dim=1, dtype=torch.int32) for matrix in (meets, full))
    end = taken + counts.cumsum(0)
    begin = end - counts
    full_end = begin + full_counts
    rank, full_rank = (matrix.cumsum(dim=1, dtype=torch.int32) for matrix in (meets, full))
    rank = torch.where(full, full_rank, full_counts[:, None] + rank - full_rank) - 1
    place = torch.where(meets & (end <= room)[:, None], begin[:, None] + rank, room)
    tiles.scatter_(0, place.flatten(), columns.expand_as(meets).flatten())
    return begin, full_end, end


def _fitted(
    places: tuple[Tensor, Tensor, Tensor], meets: Tensor, full: Tensor, columns: Tensor, room: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_append` gave; but rows that do not fit get a range of the `count` tiles that lie past the room."""
    fits = places[-1] <= room
    spans = _spans(meets, full, columns, count)
    return tuple(torch.where(fits, place, room + bound) for place, bound in zip(places, spans, strict=True))


def _spans(meets: Tensor, full: Tensor, columns: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row: the first tile that it meets, the first after it that is not full, and the one past the last."""
    first = torch.where(meets, columns, count).amin(dim=1)
    end = torch.maximum(first, torch.where(meets, columns + 1, 0).amax(dim=1))
    gap = torch.where(full | (columns < first[:, None]), count, columns).amin(dim=1)
    return first, torch.minimum(gap, end), end


def _longest_first(counts: Tensor) -> Tensor:
    return torch.sort(counts, descending=True, stable=True)[1].to(torch.int32)
