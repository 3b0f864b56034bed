import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from sora_fast.masks import SpacetimeMask
from sora_fast.packing import PackedLayout
from tests.layouts import GRIDS, MASKS, Pack, packs


def allowed(mask: SpacetimeMask, query: tuple[int, ...], key: tuple[int, ...], grid: tuple[int, int, int]) -> bool:
    """The definition, for two tokens of one segment, in plain numbers."""
    for axis, (low, high) in enumerate((mask.t, mask.h, mask.w)):
        step = mask.stride[axis]
        anchor = query[axis] // step * step + (step - 1) // 2
        if mask.clamp[axis]:
            # The window [anchor + low, anchor + high], pushed back into the grid; all of it if it does not fit.
            if high - low + 1 >= grid[axis]:
                continue
            anchor = min(max(anchor, -low), grid[axis] - 1 - high)
        distance = key[axis] - anchor
        if (low is not None and distance < low) or (high is not None and distance > high):
            return False
    return not mask.causal_tokens or key <= query


@given(packs(max_grids=2), MASKS)
def test_materialize_is_the_definition(pack: Pack, mask: SpacetimeMask) -> None:
    layout = pack.layout
    dense = mask.materialize(layout)
    coords = [tuple(place) for place in layout.coords.tolist()]
    segments = layout.segment_ids.tolist()
    for i, j in itertools.islice(itertools.product(range(layout.capacity), repeat=2), 0, None, 3):
        expected = segments[i] == segments[j] >= 0 and allowed(mask, coords[i], coords[j], pack.grids[segments[i]])
        assert bool(dense[i, j]) == expected


@given(GRIDS, MASKS)
def test_pairs_are_those_of_the_dense_matrix(grid: tuple[int, int, int], mask: SpacetimeMask) -> None:
    assert mask.pairs(grid) == int(mask.materialize(PackedLayout.from_grids([grid])).sum())


def test_clamped_window_is_nattens_neighbourhood() -> None:
    layout = PackedLayout.from_grids([(1, 1, 7)])
    dense = SpacetimeMask.window(None, None, 1, clamp=True).materialize(layout)
    assert dense.sum(1).tolist() == [3] * 7, "every query sees as many keys, at the edges too"
    assert dense[0].nonzero().flatten().tolist() == [0, 1, 2]


def test_strided_window_is_shared_by_a_group() -> None:
    layout = PackedLayout.from_grids([(1, 1, 9)])
    dense = SpacetimeMask.window(None, None, 4, stride=(1, 1, 3)).materialize(layout)
    assert torch.equal(dense[3], dense[5]) and not torch.equal(dense[5], dense[6])


def test_causal_masks_never_look_ahead() -> None:
    layout = PackedLayout.from_grids([(4, 2, 3)], order="tiled", tile_size=16)
    later = layout.coords[None, :, 0] > layout.coords[:, None, 0]
    causal_window = SpacetimeMask.window(2, 1, 1, causal=True, clamp=True, stride=(1, 2, 2))
    for mask in (SpacetimeMask.frame_causal(), causal_window, SpacetimeMask.token_causal()):
        assert not (mask.materialize(layout) & later).any()


def test_bounds_beyond_every_coordinate_are_none() -> None:
    layout = PackedLayout.from_grids([(4, 3, 2)])
    for far in (1 << 20, (1 << 31) - 1, 1 << 40):
        wide = SpacetimeMask(t=(0, far), w=(-far, 0))
        assert torch.equal(wide.materialize(layout), SpacetimeMask(t=(0, None), w=(None, 0)).materialize(layout))


def test_bounds_are_integers() -> None:
    with pytest.raises(TypeError, match=r"t: interval \(-1.5, 1.5\); its bounds must be integers or None"):
        SpacetimeMask.window(1.5, 1, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpacetimeMask(t=(1, 0)), r"t: interval \(1, 0\) is empty"),
        (lambda: SpacetimeMask(clamp=(True, False, False)), "clamp: axis t .* two finite bounds"),
        (lambda: SpacetimeMask(h=(1, 2), clamp=(False, True, False)), "clamp: axis h .* contain 0"),
        (lambda: SpacetimeMask(stride=(0, 1, 1)), "stride"),
        (lambda: SpacetimeMask.window(1, -1, 1), "h: radius -1"),
        (lambda: SpacetimeMask.window(1, 1, 1, causal=True, stride=(2, 1, 1)), "stride: .* causal=True"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(packs(max_grids=2), MASKS)
def test_what_sees_the_past_is_the_past(pack: Pack, mask: SpacetimeMask) -> None:
    if not mask.sees_past:
        return
    layout = pack.layout
    moment = layout.raster_index if mask.causal_tokens else layout.coords[:, 0]
    same = (layout.segment_ids[:, None] == layout.segment_ids) & (layout.segment_ids >= 0)
    assert torch.equal(mask.materialize(layout), same & (moment <= moment[:, None]))


def test_which_masks_see_the_past() -> None:
    past = [SpacetimeMask.frame_causal(), SpacetimeMask.token_causal(), SpacetimeMask(causal_tokens=True)]
    others = [SpacetimeMask.full(), SpacetimeMask(t=(None, 1)), SpacetimeMask(t=(None, 0), w=(0, 0))]
    others += [SpacetimeMask(t=(None, 0), stride=(2, 1, 1)), SpacetimeMask(t=(None, -1), causal_tokens=True)]
    assert all(mask.sees_past for mask in past) and not any(mask.sees_past for mask in others)


def test_lists_are_tuples() -> None:
    """A mask is a key of what is computed from it."""
    mask = SpacetimeMask(t=[None, 0], stride=[1, 2, 1], clamp=[False, False, False])
    assert mask == SpacetimeMask(t=(None, 0), stride=(1, 2, 1)) and hash(mask) == hash(replace(mask))
