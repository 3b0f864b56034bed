"""Layouts of segments of which nothing but the lengths is known: lines of tokens."""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from sora_fast.ops._checks import check_dtype, check_shape, may_read
from sora_fast.packing.coordinates import MAX_GRID
from sora_fast.packing.layout import PackedLayout
from sora_fast.packing.order import cut_tiles


def layout_from_cu_seqlens(
    cu_seqlens: Tensor, *, capacity: int, name: str = "cu_seqlens", tile_size: int = 128
) -> PackedLayout:
    """The layout of segments that lie one after the other, on the device of `cu_seqlens`; never waits for it.

    cu_seqlens: [S+1] int32, first token of every segment, then the end; `name` is what messages call it.
    capacity: tokens in the packed sequence; those past the end are padding.
    A segment of L tokens is the grid (L, 1, 1), as a text is: full and token-causal masks mean what they say. Places
    along t end at 1,021, and what lies further has that one, so other masks and positions suit shorter segments only.

    Raises TypeError or ValueError for what is no such tensor; on a CPU also for offsets that do not start at 0,
    decrease, or end past the capacity.
    """
    check_shape(name, cu_seqlens, ["S+1"])
    check_dtype(name, cu_seqlens, [torch.int32])
    if len(cu_seqlens) < 2:
        raise ValueError(f"{name}: shape {tuple(cu_seqlens.shape)}; it must have two offsets at least")
    if may_read(cu_seqlens):
        _check_offsets(name, cu_seqlens.tolist(), capacity)
    # Memory of the layout's own, in line, for kernels and for `refresh_`, which writes there. Where offsets are not
    # read, none may lead a kernel out of the sequence.
    cu_seqlens = cu_seqlens.clamp(0, capacity).cummax(0)[0]
    lengths, end = cu_seqlens.diff(), cu_seqlens[-1]
    tokens = torch.arange(capacity, dtype=torch.int32, device=cu_seqlens.device)
    segments = torch.searchsorted(cu_seqlens, tokens, right=True, out_int32=True) - 1
    places = torch.where(tokens < end, tokens - cu_seqlens[segments], 0)
    zeros, ones = torch.zeros_like(places), torch.ones_like(lengths)
    return PackedLayout(
        cu_seqlens=cu_seqlens,
        grids=torch.stack([lengths, ones, ones], dim=1),
        segment_ids=torch.where(tokens < end, segments, -1),
        coords=torch.stack([places.clamp(max=MAX_GRID[0] - 1), zeros, zeros], dim=1),
        raster_index=places,
        tile_offsets=cut_tiles(cu_seqlens, capacity=capacity, tile_size=tile_size),
        tile_size=tile_size,
        is_raster=True,
    )


def ending_together(layout: PackedLayout, keys: PackedLayout) -> tuple[PackedLayout, PackedLayout]:
    """Both, with places counted so that the last query and the last key of a segment stand at the same one.

    That is flash-attn's causal mask for sides of unequal lengths: the last query sees the last key. layout, keys: from
    `layout_from_cu_seqlens`; of equally many segments. Never waits for the device.
    """
    if layout.max_segments != keys.max_segments:
        raise ValueError(
            f"keys: {keys.max_segments} segments; they must be as many as the {layout.max_segments} of layout"
        )
    lengths = [side.cu_seqlens.diff() for side in (layout, keys)]
    longest = torch.maximum(*lengths)
    return tuple(_behind(side, longest - own, longest) for side, own in zip((layout, keys), lengths, strict=True))


def _behind(layout: PackedLayout, ahead: Tensor, lengths: Tensor) -> PackedLayout:
    """The layout as the last part of longer lines, with `ahead` [S] tokens of each before it."""
    used = layout.segment_ids >= 0
    places = torch.where(used, layout.raster_index + ahead[layout.segment_ids.clamp(min=0)], 0)
    zeros, ones = torch.zeros_like(places), torch.ones_like(lengths)
    return replace(
        layout,
        grids=torch.stack([lengths, ones, ones], dim=1),
        coords=torch.stack([places.clamp(max=MAX_GRID[0] - 1), zeros, zeros], dim=1),
        raster_index=places,
    )


def _check_offsets(name: str, offsets: list[int], capacity: int) -> None:
    if offsets[0] != 0:
        raise ValueError(f"{name}: it starts at {offsets[0]}; the first segment must start at 0")
    for segment, (start, end) in enumerate(pairwise(offsets)):
        if end < start:
            raise ValueError(
                f"{name}: segment {segment} starts at {start} and ends at {end}; offsets must not decrease"
            )
    if offsets[-1] > capacity:
        raise ValueError(f"{name}: the last segment ends at {offsets[-1]}, but there are {capacity} tokens")
