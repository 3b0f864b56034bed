from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given

from sora_fast.packing import PackedLayout, token_grid
from tests.layouts import Pack, packs


@given(packs())
def test_every_token_has_one_place(pack: Pack) -> None:
    layout = pack.layout
    offsets = layout.cu_seqlens.tolist()
    for segment, grid in enumerate(pack.grids):
        place = slice(offsets[segment], offsets[segment + 1])
        expected = np.arange(np.prod(grid)) if pack.keep is None else np.sort(pack.keep[segment])
        assert np.array_equal(np.sort(layout.raster_index[place].numpy()), expected)
        assert (layout.segment_ids[place] == segment).all()
        t, h, w = layout.coords[place].long().unbind(1)
        assert torch.equal((t * grid[1] + h) * grid[2] + w, layout.raster_index[place].long())
        assert layout.grids[segment].tolist() == list(grid)
    used = offsets[len(pack.grids)]
    assert set(offsets[len(pack.grids) :]) == {used}
    assert (layout.segment_ids[used:] == -1).all()
    assert not layout.coords[used:].any() and not layout.raster_index[used:].any()


@given(packs(tile_sizes=(16, 32)))
def test_tiles_cover_the_tokens_without_crossing_segments(pack: Pack) -> None:
    layout = pack.layout
    offsets = layout.tile_offsets.tolist()
    assert offsets[0] == 0 and offsets[-1] == int(layout.cu_seqlens[-1])
    for start, end in pairwise(offsets):
        assert 0 <= end - start <= layout.tile_size
        assert len(set(layout.segment_ids[start:end].tolist())) <= 1
    lengths = np.diff(offsets)
    assert (np.diff((lengths > 0).astype(int)) <= 0).all(), "an unused tile lies before a used one"
    ids = layout.tile_ids()
    for tile, (start, end) in enumerate(pairwise(offsets)):
        assert (ids[start:end] == tile).all()


def test_shapes_depend_on_the_capacities_only() -> None:
    shapes = set()
    for grids in ([], [(3, 4, 5)], [(1, 1, 1)] * 7, [(2, 3, 3), (0, 2, 2), (1, 8, 9)]):
        layout = PackedLayout.from_grids(grids, order="tiled", capacity=256, max_segments=8)
        tensors = (layout.cu_seqlens, layout.grids, layout.segment_ids, layout.coords, layout.tile_offsets)
        assert all(tensor.dtype == torch.int32 for tensor in tensors)
        shapes.add(tuple(tuple(tensor.shape) for tensor in tensors))
    assert len(shapes) == 1


def test_tiled_order_lays_out_boxes() -> None:
    layout = PackedLayout.from_grids([(4, 4, 8)], order="tiled", box=(2, 2, 4), tile_size=16)
    for tile in range(8):
        coords = layout.coords[16 * tile : 16 * tile + 16]
        assert (coords.amax(0) - coords.amin(0)).tolist() == [1, 1, 3]


@pytest.mark.parametrize(
    ("grids", "options", "message"),
    [
        ([(1, 2)], {}, "grids: segment 0"),
        ([(1, 2, -1)], {}, "grids: segment 0"),
        ([(1, 2, 3), (2000, 1, 1)], {}, "grids: segment 1 .* largest possible"),
        ([(1, 2, 3)], {"capacity": 5}, "capacity: 5, but the batch has 6"),
        ([(1, 2, 3)] * 3, {"max_segments": 2}, "max_segments: 2"),
        ([(1, 2, 3)], {"order": "zigzag"}, "order: 'zigzag'"),
        ([(1, 2, 3)], {"box": (1, 1, 1)}, "box: .* only order="),
        ([(1, 2, 3)], {"order": "tiled", "box": (9, 9, 9)}, "box: .* at most 128"),
        ([(1, 2, 3)], {"tile_size": 100}, "tile_size: 100"),
        ([(1, 2, 3)], {"keep": []}, "keep: 0 entries"),
        ([(1, 2, 3)], {"keep": [np.array([6])]}, "keep: segment 0 names tokens 6"),
        ([(1, 2, 3)], {"keep": [np.array([1, 1])]}, "keep: segment 0 names tokens twice"),
    ],
)
def test_bad_input_is_named(grids: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_grids(grids, **options)


@pytest.mark.parametrize("keep", [np.array([True, False]), torch.tensor([True, False]), [0.9]])
def test_only_indices_say_what_is_kept(keep: object) -> None:
    with pytest.raises(TypeError, match=r"keep: segment 0 has (bool|float64); it must be integers"):
        PackedLayout.from_grids([(1, 1, 2)], keep=[keep])


def test_moves_as_one() -> None:
    layout = PackedLayout.from_grids([(1, 2, 3)], tile_size=16)
    moved = layout.to("meta")
    assert moved.device.type == "meta" and moved.tile_offsets.device.type == "meta"
    assert moved.tile_size == 16


def test_token_grid_counts_patches_that_are_not_full() -> None:
    assert token_grid((3, 5, 8, 9), (2, 4, 4)) == (3, 2, 3)
    assert token_grid((16, 1, 4, 1), (4, 4, 4)) == (1, 1, 1)
