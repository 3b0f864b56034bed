"""Two packs in one: the second's segments follow the first's, on the device, with static shapes and no sync."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents, RowIndex

if TYPE_CHECKING:
    from sora_fast.models.text import PackedText


def join_layouts(first: PackedLayout, second: PackedLayout) -> PackedLayout:
    """Segments 0 … S−1 are the first's, S … the second's; capacities add up. The tile sizes must agree."""
    if first.tile_size != second.tile_size:
        raise ValueError(f"second: tile_size {second.tile_size}; it must be {first.tile_size}, as the first's")
    source = _token_source(first, second)
    ids = torch.where(second.segment_ids >= 0, second.segment_ids + first.max_segments, -1)
    return PackedLayout(
        cu_seqlens=_join_offsets(first.cu_seqlens, second.cu_seqlens),
        grids=torch.cat([first.grids, second.grids]),
        segment_ids=_take(first.segment_ids, ids, source, fill=-1),
        coords=_take(first.coords, second.coords, source),
        raster_index=_take(first.raster_index, second.raster_index, source),
        tile_offsets=_unused_last(_join_offsets(first.tile_offsets, second.tile_offsets)),
        tile_size=first.tile_size,
        is_raster=first.is_raster and second.is_raster,
        is_joint=first.is_joint or second.is_joint,
    )


def join_tokens(first: Tensor, second: Tensor, layouts: tuple[PackedLayout, PackedLayout], fill: float = 0) -> Tensor:
    """Values of tokens [N1, …] and [N2, …] in the order of `join_layouts(*layouts)`; `fill` on padding."""
    return _take(first, second, _token_source(*layouts), fill)


def join_latents(first: RaggedLatents, second: RaggedLatents) -> RaggedLatents:
    """The first's videos, then the second's; what lies past the last is zero."""
    source = _source(first.offsets[-1], first.flat.shape[0], second.offsets[-1], second.flat.shape[0])
    flat = _take(first.flat, second.flat, source)
    return RaggedLatents(flat, _join_offsets(first.offsets, second.offsets), torch.cat([first.shapes, second.shapes]))


def join_rows(first: RowIndex, second: RowIndex, layouts: tuple[PackedLayout, PackedLayout]) -> RowIndex:
    """The first's rows, then the second's, for `join_layouts(*layouts)`."""
    shifted = torch.where(second.index >= 0, second.index + first.num_rows, -1)
    index = join_tokens(first.index, shifted, layouts, fill=-1)
    return RowIndex.from_index(index, first.num_rows + second.num_rows)


def join_conditioning(
    first: Conditioning,
    second: Conditioning,
    layouts: tuple[PackedLayout, PackedLayout],
    *,
    rows: RowIndex | None = None,
) -> Conditioning:
    """The first's rows, then the second's, for `join_layouts(*layouts)`. rows: what `join_rows` gave for them.

    ValueError if only one of them has a `sigma_end`.
    """
    if (first.sigma_end is None) != (second.sigma_end is None):
        raise ValueError("second: it must have a sigma_end exactly where the first has one")
    return replace(
        first,
        sigma=torch.cat([first.sigma, second.sigma]),
        segment=torch.cat(
            [first.segment, torch.where(second.segment >= 0, second.segment + layouts[0].max_segments, -1)]
        ),
        rows=join_rows(first.rows, second.rows, layouts) if rows is None else rows,
        sigma_end=None if first.sigma_end is None else torch.cat([first.sigma_end, second.sigma_end]),
    )


def join_texts(first: "PackedText", second: "PackedText") -> "PackedText":
    """The first's texts, then the second's."""
    layouts = (first.layout, second.layout)
    pooled = None if first.pooled is None else torch.cat([first.pooled, second.pooled])
    return replace(
        first,
        tokens=join_tokens(first.tokens, second.tokens, layouts),
        layout=join_layouts(*layouts),
        pooled=pooled,
    )


def _token_source(first: PackedLayout, second: PackedLayout) -> Tensor:
    return _source(first.cu_seqlens[-1], first.capacity, second.cu_seqlens[-1], second.capacity)


def _source(used: Tensor, size: int, other_used: Tensor, other_size: int) -> Tensor:
    """For each place of the joined pack, where it comes from in (first, second, one fill value)."""
    place = torch.arange(size + other_size, device=used.device)
    source = torch.where(place < used, place, place - used + size)
    return torch.where(place < used + other_used, source, size + other_size)


def _take(first: Tensor, second: Tensor, source: Tensor, fill: float = 0) -> Tensor:
    padding = first.new_full((1, *first.shape[1:]), fill)
    return torch.cat([first, second, padding])[source]


def _join_offsets(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, first[-1] + second[1:]])


def _unused_last(offsets: Tensor) -> Tensor:
    """Empty ranges moved behind the others, whose order stays."""
    sizes = offsets.diff()
    sizes = sizes[torch.argsort(sizes == 0, stable=True)]
    return torch.cat([offsets[:1], sizes.cumsum(0)]).to(offsets.dtype)
