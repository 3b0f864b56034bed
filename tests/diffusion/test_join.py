from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_fast.diffusion.join import join_conditioning, join_latents, join_layouts, join_tokens
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents, RowIndex
from tests.layouts import packs


@given(packs(), packs())
def test_joined_layouts_hold_first_the_one_then_the_other(first, second):
    first, second = first.layout, second.layout
    joined = join_layouts(first, second)
    sizes = [int(layout.cu_seqlens[-1]) for layout in (first, second)]
    used = sum(sizes)

    def both(name: str) -> torch.Tensor:
        return torch.cat([getattr(first, name)[: sizes[0]], getattr(second, name)[: sizes[1]]])

    assert joined.capacity == first.capacity + second.capacity
    assert torch.equal(joined.grids, torch.cat([first.grids, second.grids]))
    lengths = torch.cat([first.cu_seqlens.diff(), second.cu_seqlens.diff()])
    assert torch.equal(joined.cu_seqlens.diff(), lengths) and joined.cu_seqlens[0] == 0
    ids = both("segment_ids")
    ids[sizes[0] :] += first.max_segments
    assert torch.equal(joined.segment_ids[:used], ids) and (joined.segment_ids[used:] == -1).all()
    for name in ("coords", "raster_index"):
        value = getattr(joined, name)
        assert torch.equal(value[:used], both(name)) and not value[used:].any()

    tiles = torch.cat([first.tile_offsets.diff(), second.tile_offsets.diff()])
    tiles = tiles[tiles > 0]
    assert torch.equal(joined.tile_offsets.diff()[: len(tiles)], tiles)
    assert joined.tile_offsets[0] == 0 and not joined.tile_offsets.diff()[len(tiles) :].any()
    for name in ("cu_seqlens", "grids", "segment_ids", "coords", "raster_index", "tile_offsets"):
        assert getattr(joined, name).dtype == torch.int32


@given(packs(), packs(), st.integers(0, 99))
def test_joined_conditioning_gives_every_token_its_own_level(first, second, seed):
    layouts = first.layout, second.layout
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for layout in layouts:
        sigma = torch.rand(layout.max_segments, generator=generator)
        clean = torch.rand(layout.capacity, generator=generator) < 0.5
        parts.append(Conditioning.with_clean(sigma, clean, layout, sigma_end=sigma / 2))

    def levels(conditioning: Conditioning) -> torch.Tensor:
        return torch.cat([conditioning.sigma, torch.tensor([-1.0])])[conditioning.index]

    joined, layout = join_conditioning(*parts, layouts), join_layouts(*layouts)
    wanted = join_tokens(*map(levels, parts), layouts, fill=-1)
    assert torch.equal(levels(joined), wanted)
    assert torch.equal(joined.sigma_end, joined.sigma / 2)
    with pytest.raises(ValueError, match="sigma_end"):
        join_conditioning(parts[0], replace(parts[1], sigma_end=None), layouts)
    used = layout.segment_ids >= 0
    assert torch.equal(joined.segment[joined.index[used]], layout.segment_ids[used])
    rebuilt = RowIndex.from_index(joined.index, len(joined.sigma))
    assert torch.equal(joined.rows.offsets, rebuilt.offsets) and torch.equal(joined.rows.tokens, rebuilt.tokens)


def test_joined_latents_hold_both_lists_of_videos():
    videos = [torch.randn(shape) for shape in [(1, 2, 3, 1), (1, 1, 1, 2), (1, 2, 2, 2)]]
    first = RaggedLatents.from_list(videos[:2], capacity=10, max_segments=3)
    first.flat[8:] = torch.nan
    second = RaggedLatents.from_list(videos[2:], capacity=9)
    joined = join_latents(first, second)
    assert joined.flat.shape == (19,) and joined.max_segments == 4 and joined.offsets.tolist() == [0, 6, 8, 8, 16]
    assert all(torch.equal(*pair) for pair in zip(joined.to_list(), videos, strict=True))
    assert not joined.flat[16:].any()


def test_tile_sizes_must_agree():
    first, second = (PackedLayout.from_grids([(1, 1, 1)], tile_size=size) for size in (16, 32))
    with pytest.raises(ValueError, match="second: tile_size 32; it must be 16"):
        join_layouts(first, second)
