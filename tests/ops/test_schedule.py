"""The kernels that fill a TileSchedule, beside plain PyTorch: the same numbers, all of them."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_fast import use_backend
from sora_fast.kernels import schedule as kernels
from sora_fast.masks import SpacetimeMask
from sora_fast.ops import _schedule as module
from sora_fast.packing import JointLayout, PackedLayout
from sora_fast.proof.rule import poisoned_scratch
from sora_fast.schedule import TileSchedule
from tests.helpers import examples
from tests.layouts import MASKS, packs, part_pairs
from tests.modulated import no_recompilation
from tests.packing.test_joint import joints
from tests.schedule.test_tile_schedule import assert_same, cleared

WINDOW = SpacetimeMask.window(1, 1, 1, clamp=True, stride=(1, 2, 2))
GRIDS = [(2, 3, 5), (0, 2, 2), (1, 1, 1), (3, 4, 2)]


def both(layout: PackedLayout, mask: SpacetimeMask | None, device: torch.device, **options: Any) -> list[TileSchedule]:
    """What the kernels give, and what PyTorch does."""
    with use_backend("triton"), poisoned_scratch():
        filled = TileSchedule.build(layout.to(device), mask, **options).to("cpu")
    with use_backend("torch"):
        return [filled, TileSchedule.build(layout, mask, **options)]


@examples(12)
@given(data=st.data(), mask=MASKS)
def test_random_schedules(data: st.DataObject, mask: SpacetimeMask, device: torch.device) -> None:
    layout = data.draw(packs(mask=data.draw(st.sampled_from([None, mask])), max_grids=2)).layout
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(kernels, "COLUMNS", data.draw(st.sampled_from([2, 256])))
        monkeypatch.setattr(kernels, "ROWS", data.draw(st.sampled_from([4, 1024])))
        assert_same(*both(layout, mask, device, max_pairs=data.draw(st.sampled_from([0, 3, 10, 1 << 24]))))


@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize("mask", [SpacetimeMask.frame_causal(), SpacetimeMask.token_causal()])
def test_causal_masks_in_either_order(mask: SpacetimeMask, order: str, device: torch.device) -> None:
    grids, keep = [(7, 9, 6), (3, 2, 2)], [range(0, 378, 2), range(12)]
    # 189 tokens in frames of 27: a search for a frame takes two steps.
    layout = PackedLayout.from_grids(grids, order=order, capacity=220, max_segments=3, keep=[[*k] for k in keep])
    assert_same(*both(layout, mask, device))


def test_a_list_without_room(device: torch.device) -> None:
    layout = PackedLayout.from_grids(GRIDS, order="tiled", box=(1, 2, 2), tile_size=16)
    filled, plain = both(layout, SpacetimeMask.token_causal(), device, max_pairs=4)
    assert int(plain.overflow) > 0
    assert_same(filled, plain)


@examples(12)
@given(sides=part_pairs(), mask=MASKS, max_pairs=st.sampled_from([0, 3, 10, 1 << 24]))
def test_parts_of_one_grid(
    sides: tuple[PackedLayout, PackedLayout], mask: SpacetimeMask, max_pairs: int, device: torch.device
) -> None:
    layout, keys = sides
    with use_backend("triton"), poisoned_scratch():
        filled = TileSchedule.build(layout.to(device), mask, kv_layout=keys.to(device), max_pairs=max_pairs)
    assert_same(filled.to("cpu"), TileSchedule.build(layout, mask, kv_layout=keys, max_pairs=max_pairs))


@examples(4)  # interpreted, each takes a second
@given(sides=joints(), mask=MASKS, max_pairs=st.sampled_from([0, 3, 10, 1 << 24]))
def test_joint_layouts(
    sides: tuple[JointLayout, PackedLayout, PackedLayout], mask: SpacetimeMask, max_pairs: int, device: torch.device
) -> None:
    assert_same(*both(sides[0].layout, mask, device, max_pairs=max_pairs))


def test_cross_attention(device: torch.device) -> None:
    layout = PackedLayout.from_grids(GRIDS, capacity=70, max_segments=6, tile_size=16)
    text = PackedLayout.from_grids([(n, 1, 1) for n in (3, 7, 0, 37)], capacity=50, max_segments=6, tile_size=32)
    with use_backend("triton"):
        filled = TileSchedule.build(layout.to(device), kv_layout=text.to(device))
    assert_same(filled.to("cpu"), TileSchedule.build(layout, kv_layout=text))


@pytest.mark.parametrize("mask", [SpacetimeMask.full(), WINDOW])
def test_empty_pack(mask: SpacetimeMask, device: torch.device) -> None:
    assert_same(*both(PackedLayout.from_grids([]), mask, device))


@pytest.mark.parametrize("mask", [SpacetimeMask.frame_causal(), WINDOW])
def test_refreshed_in_place(mask: SpacetimeMask, device: torch.device) -> None:
    sizes = {"capacity": 66, "max_segments": 4, "tile_size": 16}
    first, second = (PackedLayout.from_grids(grids, **sizes) for grids in ([(4, 4, 4)], GRIDS))
    with use_backend("triton"):
        schedule = TileSchedule.build(first.to(device), mask)
        memory = [schedule.by_query.begin.data_ptr(), schedule.query_low.data_ptr(), schedule.layout.coords.data_ptr()]
        schedule.refresh_(second.to(device))
    after = [schedule.by_query.begin.data_ptr(), schedule.query_low.data_ptr(), schedule.layout.coords.data_ptr()]
    assert memory == after
    assert_same(cleared(schedule).to("cpu"), TileSchedule.build(second, mask))


def test_few_launches() -> None:
    from sora_fast.kernels._launch import recording

    layout = PackedLayout.from_grids(GRIDS, order="tiled", tile_size=16)
    raster = PackedLayout.from_grids(GRIDS, tile_size=16)
    for batch, options, count in (
        (layout, {}, 2),
        (layout, {"kv_layout": raster}, 3),
        (layout, {"kv_layout": raster, "mask": WINDOW}, 4),
        (raster, {"mask": SpacetimeMask.frame_causal()}, 2),
        (layout, {"mask": WINDOW}, 3),
    ):
        with use_backend("triton"), recording((9, 0)) as recorder:
            TileSchedule.build(batch, **options)
        assert len(recorder.launches) == count


def test_opcheck(device: torch.device) -> None:
    layout = PackedLayout.from_grids([(1, 3, 4), (1, 1, 2)], order="tiled", capacity=16, tile_size=16, device=device)
    s = TileSchedule.build(layout, WINDOW)
    written = [[s.query_low, s.query_high, s.key_place, s.overflow], *map(module._tensors, (s.by_query, s.by_key))]
    options = (module._axes(WINDOW), False, False, [False, False], [16, 16], s.max_pairs)
    torch.library.opcheck(module._fill_op, (module._tensors(layout), [], *written, *options))


def test_compiles_once_for_ragged_batches(device: torch.device) -> None:
    def call(layout: PackedLayout) -> tuple[torch.Tensor, ...]:
        schedule = TileSchedule.build(layout, WINDOW)
        return schedule.by_query.order, schedule.by_key.end, schedule.query_high

    with use_backend("triton"), no_recompilation():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for grids in ([(2, 3, 5)], GRIDS[:2]):
            layout = PackedLayout.from_grids(grids, capacity=40, max_segments=2, tile_size=16, device=device)
            assert all(torch.equal(a, b) for a, b in zip(compiled(layout), call(layout), strict=True))
