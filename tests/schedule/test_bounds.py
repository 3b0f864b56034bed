import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_fast.masks import SpacetimeMask
from sora_fast.packing import PackedLayout
from sora_fast.schedule.bounds import Bounds, Groups
from tests.layouts import MASKS, Pack, packs


@given(packs(), MASKS, st.sampled_from([1, 3, 16]))
def test_what_is_decided_of_blocks(pack: Pack, mask: SpacetimeMask, size: int) -> None:
    layout = pack.layout
    blocks = Groups.blocks(layout, size)
    meets, full = Bounds.of(blocks, blocks, mask).decide(slice(None), slice(None))
    ids, used, dense = blocks.ids, layout.segment_ids >= 0, mask.materialize(layout)
    for query in range(blocks.count):
        for key in range(blocks.count):
            pairs = dense[(ids == query) & used][:, (ids == key) & used]
            assert meets[query, key] or not pairs.any()
            assert not full[query, key] or (pairs.numel() and pairs.all())


def test_blocks_of_one_token_are_decided_exactly() -> None:
    layout = PackedLayout.from_grids([(2, 2, 2), (1, 2, 3)], capacity=16)
    blocks, mask = Groups.blocks(layout, 1), SpacetimeMask.window(0, 1, 1)
    for decided in Bounds.of(blocks, blocks, mask).decide(slice(None), slice(None)):
        assert torch.equal(decided, mask.materialize(layout))


def test_axes_without_a_bound_cost_nothing() -> None:
    tiles = Groups.tiles(PackedLayout.from_grids([(2, 3, 4)]))
    axes = [
        Bounds.of(tiles, tiles, mask).key[0].shape[1]
        for mask in (SpacetimeMask.full(), SpacetimeMask.frame_causal(), SpacetimeMask.token_causal())
    ]
    assert axes == [1, 2, 3]
