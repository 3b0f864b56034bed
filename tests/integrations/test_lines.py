import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sora_fast.integrations import layout_from_cu_seqlens
from sora_fast.masks import SpacetimeMask
from sora_fast.packing import PackedLayout
from sora_fast.schedule import TileSchedule

TENSORS = ("cu_seqlens", "grids", "segment_ids", "coords", "raster_index", "tile_offsets")


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@given(
    st.lists(st.sampled_from([0, 1, 15, 16, 17, 40, 130]), min_size=1, max_size=5),
    st.integers(0, 20),
    st.sampled_from([16, 128]),
)
def test_the_layout_of_lines(lengths: list[int], spare: int, tile_size: int) -> None:
    sizes = {"capacity": sum(lengths) + spare, "tile_size": tile_size}
    expected = PackedLayout.from_grids([(length, 1, 1) for length in lengths], **sizes)
    actual = layout_from_cu_seqlens(offsets(lengths), **sizes)
    for name in TENSORS:
        mine, theirs = getattr(actual, name), getattr(expected, name)
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype, name
    assert actual.tile_size == tile_size


def test_lines_longer_than_any_grid_keep_their_causal_order() -> None:
    layout = layout_from_cu_seqlens(offsets([1500, 3]), capacity=1510)
    allowed = SpacetimeMask.token_causal().materialize(layout)
    assert torch.equal(allowed[:1500, :1500], torch.ones(1500, 1500, dtype=torch.bool).tril())
    assert not allowed[:1500, 1500:].any() and not allowed[1503:].any()


def test_offsets_that_lie_apart_and_change_later() -> None:
    """Kernels read offsets in line, and a layout is refreshed in place: it has offsets of its own."""
    given = torch.stack([offsets([4, 5, 9])] * 2, dim=1)[:, 0]
    layout = layout_from_cu_seqlens(given, capacity=20)
    assert all(getattr(layout, name).is_contiguous() for name in TENSORS)
    TileSchedule.build(layout).refresh_(layout_from_cu_seqlens(offsets([1, 2, 3]), capacity=20))
    assert given.tolist() == [0, 4, 9, 18]


@pytest.mark.parametrize("wrong", [[0, 50, 50, 50], [0, 30, 10, 40], [-7, -3, 9, 12], [0, 40, 20, -20], [3, 60, 5, 2]])
@pytest.mark.parametrize("mask", [SpacetimeMask.full(), SpacetimeMask.token_causal(), SpacetimeMask.frame_causal()])
def test_offsets_that_nobody_could_check_stay_within(wrong: list[int], mask: SpacetimeMask) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sora_fast.integrations.lines.may_read", lambda tensor: False)
        layout = layout_from_cu_seqlens(torch.tensor(wrong, dtype=torch.int32), capacity=40, tile_size=16)
    schedule = TileSchedule.build(layout, mask)
    sides = [getattr(side, name) for side in (schedule.by_query, schedule.by_key) for name in ("begin", "split", "end")]
    for places in (layout.cu_seqlens, layout.tile_offsets, *sides):
        assert places.min() >= 0 and places.max() <= 40
    for bounds in (layout.cu_seqlens, layout.tile_offsets):
        assert (bounds.diff() >= 0).all()


def test_no_value_is_read() -> None:
    with FakeTensorMode(), pytest.MonkeyPatch.context() as monkeypatch:
        # Fake tensors say that they lie on a CPU.
        monkeypatch.setattr("sora_fast.integrations.lines.may_read", lambda tensor: False)
        assert layout_from_cu_seqlens(torch.zeros(4, dtype=torch.int32), capacity=9).capacity == 9


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([0, 4, 9], TypeError, "cu_seqlens: list; it must be a tensor [S+1]"),
        (torch.tensor([0, 4]), TypeError, "cu_seqlens: int64; it must be int32"),
        (offsets([4])[None], ValueError, "cu_seqlens: shape (1, 2); it must be [S+1]"),
        (offsets([]), ValueError, "cu_seqlens: shape (1,); it must have two offsets at least"),
        (offsets([4, 5]) + 1, ValueError, "cu_seqlens: it starts at 1; the first segment must start at 0"),
        (offsets([4, -1, 3]), ValueError, "cu_seqlens: segment 1 starts at 4 and ends at 3; offsets must not decrease"),
        (offsets([4, 6]), ValueError, "cu_seqlens: the last segment ends at 10, but there are 9 tokens"),
    ],
)
def test_bad_offsets_are_named(cu_seqlens: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        layout_from_cu_seqlens(cu_seqlens, capacity=9)
