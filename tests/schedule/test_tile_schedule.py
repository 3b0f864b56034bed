import warnings
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from sora_fast import use_backend
from sora_fast.masks import SpacetimeMask
from sora_fast.ops import packed_attention
from sora_fast.packing import PackedLayout
from sora_fast.packing._bundle import TensorBundle
from sora_fast.packing.coordinates import inside
from sora_fast.schedule import TileLists, TileSchedule, TokenRanges, flex, tiles
from tests.helpers import examples
from tests.layouts import MASKS, Pack, packs, part_pairs
from tests.tracing import LargestTensor


def cover(
    lists: TileLists | TokenRanges, rows: PackedLayout, columns: PackedLayout, *, by_key: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which token pairs the lists or ranges visit, and which they call full: two boolean matrices."""
    visited = torch.zeros(rows.capacity, columns.capacity, dtype=torch.bool)
    full = torch.zeros_like(visited)
    row_ends, column_ends = rows.tile_offsets.tolist(), columns.tile_offsets.tolist()
    if isinstance(lists, TokenRanges):
        for row, (begin, split, end) in enumerate(zip(lists.begin, lists.split, lists.end, strict=True)):
            tokens = slice(row_ends[row], row_ends[row + 1])
            visited[tokens, begin:end] = True
            full[tokens, split:end] = by_key
            full[tokens, begin:split] = not by_key
        return visited, full
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


def check_lists(
    lists: TileLists | TokenRanges,
    rows: PackedLayout,
    columns: PackedLayout,
    dense: torch.Tensor,
    *,
    by_key: bool = False,
) -> None:
    visited, full = cover(lists, rows, columns, by_key=by_key)
    assert not (dense & ~visited).any(), "an allowed pair is missing"
    assert not (full & ~dense).any(), "a full tile has a forbidden pair"
    lengths = (lists.end - lists.begin)[lists.order.long()]
    assert (lengths.diff() <= 0).all(), "the order is not longest first"
    assert sorted(lists.order.tolist()) == list(range(rows.max_tiles))


# With 1,000 layouts here and as many box tests below, the two properties are searched over thousands of layouts.
@examples(1000)
@given(st.data(), MASKS)
def test_lists_against_the_dense_mask(data: st.DataObject, mask: SpacetimeMask) -> None:
    layout = data.draw(packs(tile_sizes=(16, 32), mask=data.draw(st.sampled_from([None, mask])))).layout
    dense = mask.materialize(layout)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tiles, "_CHUNK_PAIRS", data.draw(st.sampled_from([1, 20, 1 << 22])))
        monkeypatch.setattr(tiles, "_TOGETHER", data.draw(st.sampled_from([1, 4, 64])))
        schedule = TileSchedule.build(layout, mask, max_pairs=data.draw(st.sampled_from([0, 3, 10, 1 << 24])))
    check_lists(schedule.by_query, layout, layout, dense)
    check_lists(schedule.by_key, layout, layout, dense.T, by_key=True)


@pytest.mark.parametrize("mask", [SpacetimeMask.frame_causal(), SpacetimeMask.token_causal()])
def test_the_past_in_raster_order_needs_no_list(mask: SpacetimeMask) -> None:
    grids, keep = [(4, 3, 5), (0, 1, 1), (2, 6, 7)], [range(0, 60, 2), [], range(84)]
    layout = PackedLayout.from_grids(grids, capacity=130, max_segments=5, keep=[[*k] for k in keep], tile_size=16)
    schedule, dense = TileSchedule.build(layout, mask, max_pairs=0), mask.materialize(layout)
    check_lists(schedule.by_query, layout, layout, dense)
    check_lists(schedule.by_key, layout, layout, dense.T, by_key=True)
    # Exactly what is met, and of that all that is met entirely.
    for side, matrix in ((schedule.by_query, dense), (schedule.by_key, dense.T)):
        visited, full = cover(side, layout, layout, by_key=side is schedule.by_key)
        for start, stop in pairwise(layout.tile_offsets.tolist()):
            assert torch.equal(visited[start:stop].any(0), matrix[start:stop].any(0))
            assert torch.equal(full[start:stop].any(0), matrix[start:stop].all(0) & (stop > start))
    assert int(schedule.overflow) == 0


def test_memory_is_bounded_for_half_a_million_tokens() -> None:
    layout = PackedLayout.from_grids([(64, 128, 64)])
    assert layout.max_tiles > 8_000, "64 million pairs of tiles"
    # Tensors that have shapes alone take neither memory nor time, and to read a value of theirs is an error.
    with LargestTensor() as largest:
        schedule = TileSchedule.build(layout.to("meta"), SpacetimeMask.temporal())
    assert largest.elements < 2**24 + 2**14
    assert schedule.by_query.tiles.shape == (2**24 + layout.max_tiles,)


EVERY_KIND = [
    SpacetimeMask.full(),
    SpacetimeMask.frame_causal(),
    SpacetimeMask.token_causal(),
    SpacetimeMask.window(1, 1, 1, clamp=True, stride=(1, 2, 2)),
]


@pytest.mark.parametrize("mask", EVERY_KIND)
@pytest.mark.parametrize("max_pairs", [5, 1 << 24])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_value_is_read(mask: SpacetimeMask, max_pairs: int, backend: str) -> None:
    layout = PackedLayout.from_grids([(3, 4, 5), (1, 6, 6)], tile_size=16, max_segments=3)
    layout, other = layout.to("meta"), layout.to("meta")
    with use_backend(backend):  # every operator that reads a value, or whose shape depends on one, is an error
        schedule = TileSchedule.build(layout, mask, max_pairs=max_pairs)
        schedule.refresh_(other)
        schedule.to_block_mask()
        if mask.is_full:
            TileSchedule.build(layout, kv_layout=other)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", EVERY_KIND)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_host_never_waits(mask: SpacetimeMask, backend: str) -> None:
    layouts = [PackedLayout.from_grids(grids, capacity=200, max_segments=3) for grids in ([(3, 4, 5)], [(2, 8, 8)] * 2)]
    expected = TileSchedule.build(layouts[1], mask)
    first, second = (layout.to("cuda") for layout in layouts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with use_backend(backend):
            schedule = TileSchedule.build(first, mask).refresh_(second)
        schedule.to_block_mask()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(schedule.to("cpu"), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_captured_graph_follows_the_batch(backend: str) -> None:
    mask, sizes = SpacetimeMask.window(1, 2, 2), {"capacity": 200, "max_segments": 3, "device": "cuda"}
    first, second = (PackedLayout.from_grids(grids, **sizes) for grids in ([(3, 4, 5)], [(2, 8, 8)]))
    with use_backend(backend):
        schedule = TileSchedule.build(first, mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            schedule.refresh_(first)
    first.copy_(second)
    graph.replay()
    assert_same(cleared(schedule), TileSchedule.build(second, mask))


def cleared(schedule: TileSchedule) -> TileSchedule:
    """Zeros behind the lists, where a refreshed schedule may keep what it had."""
    for side in (schedule.by_query, schedule.by_key):
        if isinstance(side, TileLists):
            side.tiles[int(side.end.max()) : schedule.max_pairs] = 0
    return schedule


def assert_same(actual: TensorBundle, expected: TensorBundle) -> None:
    """The same values in every tensor, those of the layouts included."""
    assert type(actual) is type(expected)
    for field in fields(actual):
        mine, theirs = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs), field.name
        elif isinstance(mine, TensorBundle):
            assert_same(mine, theirs)
        else:
            assert mine == theirs, field.name


@given(st.lists(packs(max_grids=3), min_size=2, max_size=2), MASKS, st.sampled_from([3, 1 << 24]))
def test_refreshed_in_place(pair: list[Pack], mask: SpacetimeMask, max_pairs: int) -> None:
    sizes = {
        "capacity": max(pack.layout.capacity for pack in pair),
        "max_segments": max(pack.layout.max_segments for pack in pair),
        "tile_size": 16,
    }
    first, second = (PackedLayout.from_grids(pack.grids, keep=pack.keep, **sizes) for pack in pair)
    schedule = TileSchedule.build(first, mask, max_pairs=max_pairs)
    memory = [tensor.data_ptr() for tensor in (schedule.by_query.begin, schedule.query_low, first.cu_seqlens)]
    assert schedule.refresh_(second) is schedule
    assert_same(schedule, TileSchedule.build(second, mask, max_pairs=max_pairs))
    assert memory == [tensor.data_ptr() for tensor in (schedule.by_query.begin, schedule.query_low, first.cu_seqlens)]


def test_refresh_names_another_order() -> None:
    sizes = {"capacity": 8, "max_segments": 1}
    schedule = TileSchedule.build(PackedLayout.from_grids([(2, 2, 2)], **sizes), SpacetimeMask.frame_causal())
    with pytest.raises(ValueError, match=r"layout\.is_raster: False; it must be True"):
        schedule.refresh_(PackedLayout.from_grids([(2, 2, 2)], order="tiled", **sizes))


def test_cross_attention_refreshed_in_place() -> None:
    queries, keys = (
        [PackedLayout.from_grids(grids, capacity=size, max_segments=2, tile_size=16) for grids in batches]
        for size, batches in ((60, ([(3, 4, 5)], [(1, 3, 3), (2, 2, 2)])), (9, ([(9, 1, 1)], [(0, 1, 1), (4, 1, 1)])))
    )
    schedule = TileSchedule.build(queries[0], kv_layout=keys[0]).refresh_(queries[1], kv_layout=keys[1])
    assert_same(schedule, TileSchedule.build(queries[1], kv_layout=keys[1]))
    with pytest.raises(ValueError, match=r"kv_layout.segment_ids: \[60\] on cpu; it must be \[9\] on cpu"):
        schedule.refresh_(queries[0], kv_layout=queries[1])
    assert_same(schedule, TileSchedule.build(queries[1], kv_layout=keys[1]))


def test_refresh_tells_self_from_cross_attention() -> None:
    one, other = (PackedLayout.from_grids(grids, max_segments=2) for grids in ([(2, 3, 2)], [(1, 3, 2), (1, 1, 6)]))
    alone = TileSchedule.build(one).to("cpu")
    with pytest.raises(ValueError, match="kv_layout: given; the schedule was built without one"):
        alone.refresh_(one, kv_layout=other)
    both = TileSchedule.build(one, kv_layout=other)
    with pytest.raises(ValueError, match="kv_layout: missing; the schedule was built with one"):
        both.refresh_(other)
    with pytest.raises(ValueError, match="exchanged"):
        both.refresh_(other, kv_layout=one)
    assert_same(both, TileSchedule.build(one, kv_layout=other))


def test_refresh_names_other_sizes() -> None:
    schedule = TileSchedule.build(PackedLayout.from_grids([(1, 2, 2)]), SpacetimeMask.spatial())
    with pytest.raises(ValueError, match=r"layout\.cu_seqlens: \[3\] on cpu; it must be \[2\] on cpu"):
        schedule.refresh_(PackedLayout.from_grids([(1, 2, 2)], max_segments=2))
    with pytest.raises(ValueError, match=r"layout\.tile_size: 64; it must be 128"):
        schedule.refresh_(PackedLayout.from_grids([(1, 2, 2)], tile_size=64))
    with pytest.raises(ValueError, match="kv_layout: given; the schedule was built without one"):
        schedule.refresh_(schedule.layout, kv_layout=schedule.layout)


def test_overflow_is_reported_with_the_room_that_suffices() -> None:
    layout = PackedLayout.from_grids([(8, 4, 4), (5, 4, 4)], order="tiled", box=(1, 4, 4), tile_size=16)
    mask = SpacetimeMask.frame_causal()  # tiles are frames: 8 · 9 / 2 + 5 · 6 / 2 pairs of them meet
    schedule = TileSchedule.build(layout, mask, max_pairs=20)
    assert int(schedule.overflow) == 31
    with pytest.warns(RuntimeWarning, match="51 pairs of tiles meet, but max_pairs is 20.* max_pairs=51"):
        schedule.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TileSchedule.build(layout, mask, max_pairs=51).check()
        TileSchedule.build(layout, max_pairs=0).check()


@examples(100)
@given(st.data(), MASKS)
def test_block_mask_against_the_dense_mask(data: st.DataObject, mask: SpacetimeMask) -> None:
    layout = data.draw(packs(tile_sizes=(16, 32))).layout
    if layout.capacity == 0:
        return
    size, dense = data.draw(st.sampled_from([4, 16, 128])), mask.materialize(layout)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(flex, "_BLOCK", size)
        block_mask = TileSchedule.build(layout, mask).to_block_mask()
    tokens = torch.arange(layout.capacity)[None]
    assert torch.equal(block_mask.mask_mod(None, None, tokens.T, tokens), dense)
    partial, full = (
        blocks_of(counts[0, 0], columns[0, 0], size)[: layout.capacity, : layout.capacity]
        for counts, columns in (
            (block_mask.kv_num_blocks, block_mask.kv_indices),
            (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
        )
    )
    assert not (partial & full).any(), "a block is visited twice"
    assert not (dense & ~(partial | full)).any(), "an allowed pair is missing"
    assert not (full & ~dense).any(), "a full block has a forbidden pair"


def blocks_of(counts: torch.Tensor, columns: torch.Tensor, size: int) -> torch.Tensor:
    """Which pairs of tokens lie in the blocks that a BlockMask lists."""
    listed = torch.zeros(columns.shape, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        listed[row, columns[row, :count].long()] = True
    return listed.repeat_interleave(size, 0).repeat_interleave(size, 1)


@pytest.mark.parametrize("mask", [*EVERY_KIND, SpacetimeMask(t=(1, 2), h=(-3, -1))])
def test_flex_attention_with_the_block_mask(mask: SpacetimeMask) -> None:
    torch.manual_seed(0)
    layout = PackedLayout.from_grids([(4, 6, 9), (1, 3, 3), (2, 8, 8)], order="tiled", capacity=400, max_segments=4)
    text = PackedLayout.from_grids([(7, 1, 1), (0, 1, 1), (150, 1, 1)], max_segments=4)
    for keys in (layout, text) if mask.is_full else (layout,):
        q, k, v = (torch.randn(rows.capacity, 2, 16) for rows in (layout, keys, keys))
        kv_layout = keys if keys is text else None
        schedule = TileSchedule.build(layout, mask, kv_layout=kv_layout)
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        flexed = flex_attention(*heads_first, block_mask=schedule.to_block_mask())[0].transpose(0, 1)
        ours = packed_attention(q, k, v, layout, schedule, kv_layout=kv_layout, backend="torch")
        torch.testing.assert_close(flexed, ours, rtol=1e-4, atol=2e-6)


def test_a_causal_mask_without_room_keeps_its_full_tiles() -> None:
    layout = PackedLayout.from_grids([(8, 4, 4), (5, 4, 4)], order="tiled", box=(1, 4, 4), tile_size=16)
    lists = TileSchedule.build(layout, SpacetimeMask.frame_causal(), max_pairs=0).by_query
    assert torch.equal(lists.full_end, lists.end)
    assert (lists.end - lists.begin)[:14].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 0]


@examples(1000)
@given(packs(), MASKS)
def test_packed_box_test_is_the_mask(pack: Pack, mask: SpacetimeMask) -> None:
    layout = pack.layout
    schedule = TileSchedule.build(layout, mask)
    low, high, key = schedule.query_low[:, None], schedule.query_high[:, None], schedule.key_place[None, :]
    allowed = inside(key, low, high)
    allowed &= layout.segment_ids[:, None] == layout.segment_ids[None, :]
    allowed &= (layout.segment_ids >= 0)[:, None]
    if mask.causal_tokens:
        allowed &= layout.raster_index[None, :] <= layout.raster_index[:, None]
    assert torch.equal(allowed, mask.materialize(layout))


def test_packed_box_test_at_the_largest_coordinates() -> None:
    for grid in ((1022, 1, 1), (1, 510, 1), (1, 1, 510)):
        layout = PackedLayout.from_grids([grid])
        mask = SpacetimeMask.window(3, 3, 3)
        schedule = TileSchedule.build(layout, mask)
        low, high, key = schedule.query_low[:, None], schedule.query_high[:, None], schedule.key_place[None, :]
        assert torch.equal(inside(key, low, high), mask.materialize(layout))


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
    check_lists(schedule.by_key, *reversed(layouts), dense.T, by_key=True)


@examples(300)
@given(part_pairs(), MASKS, st.data())
def test_lists_of_two_parts_of_one_grid(
    sides: tuple[PackedLayout, PackedLayout], mask: SpacetimeMask, data: st.DataObject
) -> None:
    dense = mask.materialize(*sides)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tiles, "_CHUNK_PAIRS", data.draw(st.sampled_from([1, 20, 1 << 22])))
        monkeypatch.setattr(tiles, "_TOGETHER", data.draw(st.sampled_from([1, 4, 64])))
        room = data.draw(st.sampled_from([0, 3, 10, 1 << 24]))
        schedule = TileSchedule.build(sides[0], mask, kv_layout=sides[1], max_pairs=room)
    check_lists(schedule.by_query, *sides, dense)
    check_lists(schedule.by_key, *reversed(sides), dense.T, by_key=True)


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
    with pytest.raises(
        ValueError, match=r"kv_layout: segment 1 has the grid \(3, 2, 2\), but \(1, 2, 2\) in the layout"
    ):
        other = PackedLayout.from_grids([(1, 2, 2), (3, 2, 2)])
        TileSchedule.build(layout, SpacetimeMask.spatial(), kv_layout=other)
    with pytest.raises(ValueError, match="kv_layout: 1 segments"):
        TileSchedule.build(layout, kv_layout=PackedLayout.from_grids([(4, 1, 1)]))
    with pytest.raises(ValueError, match="max_pairs: -1; it must be from 0"):
        TileSchedule.build(layout, max_pairs=-1)
