import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sora_fast.integrations import layout_from_cu_seqlens
from sora_fast.masks import SpacetimeMask
from sora_fast.packing import PackedLayout

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
