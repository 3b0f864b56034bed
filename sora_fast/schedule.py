"""TileSchedule: which tiles of the packed sequence meet which, from a layout and a mask, built on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.packing._bundle import TensorBundle
from sora_fast.packing.layout import MAX_GRID, PackedLayout

# Guard bits above the fields w:9, h:9, t:10 of a packed coordinate.
GUARD = 1 << 9 | 1 << 19 | 1 << 30


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

    @staticmethod
    def build(
        layout: PackedLayout, mask: SpacetimeMask | None = None, *, kv_layout: PackedLayout | None = None
    ) -> "TileSchedule":
        """Decide every pair of tiles by interval arithmetic on their bounding boxes; never waits for the device.

        kv_layout: cross-attention, segment s of `layout` sees all of segment s of `kv_layout`; needs the full mask.
        A full mask costs O(T); any other O(T²) for T tiles, in time and in memory.
        """
        mask = mask or SpacetimeMask.full()
        keys = kv_layout or layout
        _check(layout, mask, kv_layout)
        if mask.is_full:
            by_query, by_key = _segment_lists(layout, keys), _segment_lists(keys, layout)
        else:
            full, partial = _tile_pairs(layout, mask)
            by_query, by_key = _lists(full, partial), _lists(full.T, partial.T)
        low, high = _packed_bounds(layout, mask)
        return TileSchedule(mask, layout, keys, by_query, by_key, low, high, _packed_places(keys))


def _check(layout: PackedLayout, mask: SpacetimeMask, kv_layout: PackedLayout | None) -> None:
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


def _tile_pairs(layout: PackedLayout, mask: SpacetimeMask) -> tuple[Tensor, Tensor]:
    """Boolean matrices [T, T], query tile by key tile: entirely allowed, and allowed in part (perhaps)."""
    segment, used = _tile_segments(layout)
    tiles = layout.tile_ids().long()
    same = (segment[:, None] == segment[None, :]) & used[:, None] & used[None, :]
    first, last = mask.bounds(layout)
    meets, full = same, same
    for axis in range(3):
        place = layout.coords[:, axis]
        key_min, key_max = _per_tile(place, tiles, layout)
        low_min, low_max = _per_tile(first[:, axis], tiles, layout)
        high_min, high_max = _per_tile(last[:, axis], tiles, layout)
        meets = meets & (key_max[None, :] >= low_min[:, None]) & (key_min[None, :] <= high_max[:, None])
        full = full & (key_min[None, :] >= low_max[:, None]) & (key_max[None, :] <= high_min[:, None])
    if mask.causal_tokens:
        low, high = _per_tile(layout.raster_index, tiles, layout)
        meets = meets & (low[None, :] <= high[:, None])
        full = full & (high[None, :] <= low[:, None])
    return full, meets & ~full


def _per_tile(values: Tensor, tiles: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """Least and greatest of a token's value in each tile. Padding tokens fall into the unused place past the end."""
    index = torch.where(layout.segment_ids >= 0, tiles, layout.max_tiles)
    place = values.new_zeros(layout.max_tiles + 1)
    low = place.scatter_reduce(0, index, values, "amin", include_self=False)
    high = place.scatter_reduce(0, index, values, "amax", include_self=False)
    return low[:-1], high[:-1]


def _lists(full: Tensor, partial: Tensor) -> TileLists:
    """Rows of two boolean matrices [T, T'] as lists, full tiles first, compacted without waiting for the device."""
    wanted = torch.cat([full, partial], dim=1)
    counts = wanted.sum(dim=1, dtype=torch.int32)
    end = counts.cumsum(0, dtype=torch.int32)
    begin = end - counts
    full_end = begin + full.sum(dim=1, dtype=torch.int32)
    columns = torch.arange(full.shape[1], dtype=torch.int32, device=full.device).repeat(2).expand_as(wanted)
    # What is not wanted lands in one place past the end. A pair is full or partial, never both: T·T' places suffice.
    place = torch.where(wanted.flatten(), wanted.flatten().cumsum(0) - 1, full.numel())
    tiles = columns.new_zeros(full.numel() + 1).scatter(0, place, columns.flatten())
    return TileLists(begin, full_end, end, tiles[:-1], _longest_first(counts))


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
