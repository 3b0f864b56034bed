import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_fast.packing import Conditioning, PackedLayout, RowIndex
from tests.layouts import Pack, packs


@given(st.lists(st.integers(-1, 6), max_size=40))
def test_rows_hold_every_token_once_in_order(index: list[int]) -> None:
    rows = RowIndex.from_index(torch.tensor(index, dtype=torch.int32), 7)
    offsets, tokens = rows.offsets.tolist(), rows.tokens.tolist()
    assert rows.num_rows == 7 and rows.tokens.dtype == rows.offsets.dtype == torch.int32
    for row in range(7):
        assert tokens[offsets[row] : offsets[row + 1]] == [i for i, r in enumerate(index) if r == row]
    assert sorted(tokens[offsets[7] :]) == [i for i, r in enumerate(index) if r < 0]


def check(conditioning: Conditioning, layout: PackedLayout, expected: torch.Tensor) -> None:
    """expected: the noise level of every token, −1 for padding."""
    index = conditioning.index.long()
    used = index >= 0
    assert torch.equal(used, layout.segment_ids >= 0)
    assert torch.equal(conditioning.sigma[index[used]], expected[used])
    assert torch.equal(conditioning.segment[index[used]], layout.segment_ids[used])
    again = RowIndex.from_index(conditioning.index, conditioning.sigma.shape[0])
    assert torch.equal(conditioning.rows.offsets, again.offsets)
    counted = int(again.offsets[-1])
    assert torch.equal(conditioning.rows.tokens[:counted], again.tokens[:counted])


@given(packs())
def test_per_segment(pack: Pack) -> None:
    layout = pack.layout
    sigma = torch.rand(layout.max_segments)
    expected = torch.cat([sigma, torch.tensor([-1.0])])[layout.segment_ids.long()]
    check(Conditioning.per_segment(sigma, layout), layout, expected)


@given(packs(), st.integers(0, 1000))
def test_with_clean(pack: Pack, seed: int) -> None:
    layout = pack.layout
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.rand(layout.max_segments, generator=generator) + 0.5
    clean = torch.rand(layout.capacity, generator=generator) < 0.5
    expected = torch.cat([sigma, torch.tensor([-1.0])])[layout.segment_ids.long()]
    conditioning = Conditioning.with_clean(sigma, clean, layout)
    assert conditioning.sigma.shape == (2 * layout.max_segments,)
    check(conditioning, layout, torch.where(clean, 0.0, expected))


def test_the_level_to_lead_to_is_a_row_s_and_clean_rows_stay_at_zero() -> None:
    layout = PackedLayout.from_grids([(1, 2, 2), (2, 1, 1)], capacity=8, max_segments=2)
    clean = torch.tensor([True, False, False, False, False, False, False, False])
    sigma, end = torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.0])
    made = Conditioning.with_clean(sigma, clean, layout, sigma_end=end)
    assert made.sigma_end.tolist() == [0.25, 0, 0, 0] and made.sigma.tolist() == [0.5, 1, 0, 0]
    assert Conditioning.with_clean(sigma, clean, layout).sigma_end is None
    with pytest.raises(ValueError, match="sigma_end"):
        Conditioning.with_clean(sigma, clean, layout, sigma_end=end[:1])


@given(packs())
def test_per_frame(pack: Pack) -> None:
    layout = pack.layout
    sigma = torch.rand(layout.max_segments, 6)
    padded = torch.cat([sigma, torch.full((1, 6), -1.0)])
    expected = padded[layout.segment_ids.long(), layout.coords[:, 0].long()]
    check(Conditioning.per_frame(sigma, layout), layout, expected)


def test_bad_input_is_named() -> None:
    layout = PackedLayout.from_grids([(1, 2, 2)] * 3)
    with pytest.raises(ValueError, match=r"sigma: shape \(2,\); it must be \[3\]"):
        Conditioning.per_segment(torch.ones(2), layout)
    with pytest.raises(ValueError, match=r"clean: shape \(5,\); it must be \[12\]"):
        Conditioning.with_clean(torch.ones(3), torch.ones(5, dtype=torch.bool), layout)
    with pytest.raises(TypeError, match=r"clean: torch\.int64; it must be bool"):
        Conditioning.with_clean(torch.ones(3), torch.ones(12).long(), layout)
    with pytest.raises(TypeError, match=r"index: torch\.int64; it must be an int32 tensor"):
        RowIndex.from_index(torch.zeros(3).long(), 1)
    with pytest.raises(ValueError, match="sigma: on meta"):
        Conditioning.per_segment(torch.ones(3, device="meta"), layout)
    with pytest.raises(ValueError, match="sigma: shape"):
        Conditioning.per_frame(torch.ones(3), layout)
