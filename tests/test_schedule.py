import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sora_fast import schedule as module
from sora_fast.masks import SpacetimeMask
from sora_fast.packing import PackedLayout
from sora_fast.schedule import GUARD, TileLists, TileSchedule
from tests.layouts import MASKS, Pack, packs
from tests.tracing import LargestTensor


def cover(lists: TileLists, rows: PackedLayout, columns: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Which token pairs the lists visit, and which they call full: two boolean matrices."""
    visited = torch.zeros(rows.capacity, columns.capacity, dtype=torch.bool)
    full = torch.zeros_like(visited)
    row_ends, column_ends = rows.tile_offsets.tolist(), columns.tile_offsets.tolist()
    begin, full_end, end, tiles = (t.tolist() for t in (lists.begin, lists.full_end, lists.end, lists.tiles))
    for row in range(rows.max_tiles):
        for place in range(begin[row], end[row]):
            column = tiles[place]
            block = (
                slice(row_ends[row], row_ends[row + 1]),
                slice(column_ends[column], column_ends[column + 1]),
            )
            assert not visited[block].any(), "a pair of tiles is visited twice"
            visited[block] = True
            full[block] = place < full_end[row]
    return visited, full


def check_lists(lists: TileLists, rows: PackedLayout, columns: PackedLayout, dense: torch.Tensor) -> None:
    visited, full = cover(lists, rows, columns)
    assert not (dense & ~visited).any(), "an allowed pair is missing"
    assert not (full & ~dense).any(), "a full tile has a forbidden pair"
    lengths = (lists.end - lists.begin)[lists.order.long()]
    assert (lengths.diff() <= 0).all(), "the order is not longest first"
    assert sorted(lists.order.tolist()) == list(range(rows.max_tiles))


# With 1,000 layouts here and as many box tests below, the two properties are searched over thousands of layouts.
@settings(max_examples=1000)
@given(st.data(), MASKS)
def test_lists_against_the_dense_mask(data: st.DataObject, mask: SpacetimeMask) -> None:
    layout = data.draw(packs(tile_sizes=(16, 32), mask=data.draw(st.sampled_from([None, mask])))).layout
    dense = mask.materialize(layout)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "_CHUNK_PAIRS", data.draw(st.sampled_from([1, 20, 1 << 22])))
        schedule = TileSchedule.build(layout, mask, max_pairs=data.draw(st.sampled_from([0, 3, 10, 1 << 24])))
    check_lists(schedule.by_query, layout, layout, dense)
    check_lists(schedule.by_key, layout, layout, dense.T)


def test_memory_is_bounded_for_half_a_million_tokens() -> None:
    layout = PackedLayout.from_grids([(64, 128, 64)])
    assert layout.max_tiles > 8_000, "64 million pairs of tiles"
    # Fake tensors have shapes alone: this takes neither memory nor time, and reading a value would be an error.
    with FakeTensorMode() as fake, LargestTensor() as largest:
        schedule = TileSchedule.build(layout._map(fake.from_tensor), SpacetimeMask.token_causal())
    assert largest.elements < 2**24 + 2**14
    assert schedule.by_query.tiles.shape == (2**24 + layout.max_tiles,)


def test_a_causal_mask_without_room_keeps_its_full_tiles() -> None:
    layout = PackedLayout.from_grids([(8, 4, 4), (5, 4, 4)], tile_size=16)
    lists = TileSchedule.build(layout, SpacetimeMask.frame_causal(), max_pairs=0).by_query
    assert torch.equal(lists.full_end, lists.end)
    assert (lists.end - lists.begin)[:14].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 0]


@settings(max_examples=1000)
@given(packs(), MASKS)
def test_packed_box_test_is_the_mask(pack: Pack, mask: SpacetimeMask) -> None:
    layout = pack.layout
    schedule = TileSchedule.build(layout, mask)
    low, high, key = schedule.query_low[:, None], schedule.query_high[:, None], schedule.key_place[None, :]
    inside = (((key | GUARD) - low) & ((high | GUARD) - key) & GUARD) == GUARD
    inside &= layout.segment_ids[:, None] == layout.segment_ids[None, :]
    inside &= (layout.segment_ids >= 0)[:, None]
    if mask.causal_tokens:
        inside &= layout.raster_index[None, :] <= layout.raster_index[:, None]
    assert torch.equal(inside, mask.materialize(layout))


def test_packed_box_test_at_the_largest_coordinates() -> None:
    for grid in ((1022, 1, 1), (1, 510, 1), (1, 1, 510)):
        layout = PackedLayout.from_grids([grid])
        mask = SpacetimeMask.window(3, 3, 3)
        schedule = TileSchedule.build(layout, mask)
        low, high, key = schedule.query_low[:, None], schedule.query_high[:, None], schedule.key_place[None, :]
        inside = (((key | GUARD) - low) & ((high | GUARD) - key) & GUARD) == GUARD
        assert torch.equal(inside, mask.materialize(layout))


@given(packs(max_grids=3), packs(max_grids=3))
def test_cross_attention_lists(queries: Pack, keys: Pack) -> None:
    segments = max(1, len(queries.grids), len(keys.grids))
    layouts = [
        PackedLayout.from_grids(pack.grids, max_segments=segments, keep=pack.keep, tile_size=16)
        for pack in (queries, keys)
    ]
    schedule = TileSchedule.build(layouts[0], kv_layout=layouts[1])
    same = layouts[0].segment_ids[:, None] == layouts[1].segment_ids[None, :]
    dense = same & (layouts[0].segment_ids >= 0)[:, None]
    check_lists(schedule.by_query, *layouts, dense)
    check_lists(schedule.by_key, *reversed(layouts), dense.T)


def test_window_on_a_video_visits_eleven_percent() -> None:
    mask = SpacetimeMask.window(9, 12, 12)
    layout = PackedLayout.from_grids([(30, 48, 80)], order="tiled", for_mask=mask)
    tiles = int((layout.tile_offsets.diff() > 0).sum())
    assert int(TileSchedule.build(layout, mask).by_query.end.max()) / tiles**2 < 0.115


def test_strided_window_that_fits_the_boxes_has_full_tiles_only() -> None:
    mask = SpacetimeMask.window(None, 5, 5, stride=(1, 4, 4))
    layout = PackedLayout.from_grids([(2, 16, 16)], order="tiled", box=(1, 4, 4), tile_size=16)
    lists = TileSchedule.build(layout, SpacetimeMask(h=(-5, 6), w=(-5, 6), stride=mask.stride)).by_query
    assert torch.equal(lists.full_end, lists.end) and int(lists.end.max()) < layout.max_tiles**2


def test_bad_input_is_named() -> None:
    layout = PackedLayout.from_grids([(1, 2, 2)] * 2)
    with pytest.raises(ValueError, match=r"mask: .* kv_layout"):
        TileSchedule.build(layout, SpacetimeMask.spatial(), kv_layout=layout)
    with pytest.raises(ValueError, match="kv_layout: 1 segments"):
        TileSchedule.build(layout, kv_layout=PackedLayout.from_grids([(4, 1, 1)]))
    with pytest.raises(ValueError, match="max_pairs: -1; it must be from 0"):
        TileSchedule.build(layout, max_pairs=-1)
