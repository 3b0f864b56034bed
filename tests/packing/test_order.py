import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_fast.masks import SpacetimeMask
from sora_fast.packing import PackedLayout
from sora_fast.packing.order import Grid, choose_box, order_segment
from sora_fast.schedule import TileSchedule

SIDES = st.integers(1, 7)
GRIDS = st.tuples(SIDES, SIDES, SIDES)


@given(GRIDS, st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 2)), st.integers(0, 2**31))
def test_boxes_follow_each_other_whole(grid: Grid, box: Grid, seed: int) -> None:
    """Box after box in raster order, raster order inside; a tile is as many boxes as it has room for."""
    rng = np.random.default_rng(seed)
    kept = np.flatnonzero(rng.random(math.prod(grid)) < 0.7)
    boxes: dict[Grid, list[int]] = {}
    for raster, place in enumerate(product(*map(range, grid))):
        if raster in kept:
            boxes.setdefault(tuple(p // b for p, b in zip(place, box, strict=True)), []).append(raster)
    tiles = [0]
    for _, tokens in sorted(boxes.items()):
        if tiles[-1] + len(tokens) <= 16:
            tiles[-1] += len(tokens)
        else:
            tiles.append(len(tokens))
    order, sizes = order_segment(grid, box, 16, kept)
    assert order.tolist() == [raster for _, tokens in sorted(boxes.items()) for raster in tokens]
    assert sizes.tolist() == [size for size in tiles if size]
    assert len(sizes) <= 2 * len(kept) / 16 + 1


@pytest.mark.parametrize("keep", [None, np.array([0, 3, 4, 5, 9, 20, 23])])
def test_raster_order_is_cut_every_tile(keep: np.ndarray | None) -> None:
    order, sizes = order_segment((2, 3, 4), None, 5, keep)
    assert order.tolist() == (list(range(24)) if keep is None else keep.tolist())
    assert sizes.tolist() == ([5, 5, 5, 5, 4] if keep is None else [5, 2])


def visited_pairs(mask: SpacetimeMask, grid: Grid, box: Grid) -> int:
    """Pairs of boxes with a token in the one that may attend a token in the other, looked at one by one."""
    layout = PackedLayout.from_grids([grid])
    index = (layout.coords.numpy() // box).tolist()
    allowed = mask.materialize(layout).nonzero().tolist()
    return len({(tuple(index[query]), tuple(index[key])) for query, key in allowed})


@pytest.mark.parametrize(
    "mask", [SpacetimeMask.window(1, 2, 1), SpacetimeMask.frame_causal(), SpacetimeMask.spatial()], ids=str
)
@pytest.mark.parametrize("grid", [(3, 4, 5), (1, 6, 7), (6, 1, 2)])
def test_the_chosen_box_visits_the_fewest_pairs_of_all(mask: SpacetimeMask, grid: Grid) -> None:
    boxes = [box for box in product(*(range(1, side + 1) for side in grid)) if math.prod(box) <= 8]
    chosen = choose_box(grid, 8, mask)
    assert chosen in boxes
    assert visited_pairs(mask, grid, chosen) == min(visited_pairs(mask, grid, box) for box in boxes)


def test_box_choice_without_a_mask_is_full_and_compact() -> None:
    assert choose_box((21, 45, 80), 128, None) == (3, 5, 8)
    assert choose_box((1, 1, 300), 128, None) in [(1, 1, 100), (1, 1, 128)]


def test_box_choice_for_a_window_visits_the_fewest_tiles() -> None:
    mask = SpacetimeMask.window(1, 2, 2)
    grid = (6, 9, 10)

    def visited(**options: object) -> int:
        layout = PackedLayout.from_grids([grid], order="tiled", tile_size=16, **options)
        return int(TileSchedule.build(layout, mask).by_query.end.max())

    chosen = visited(for_mask=mask)
    # Only boxes that are a tile each: smaller ones share a tile, which the choice does not count.
    boxes = [(t, h, w) for t in (1, 2, 3) for h in (1, 3, 9) for w in (1, 2, 5, 10) if 8 < t * h * w <= 16]
    assert len(boxes) > 5
    assert chosen <= min(visited(box=box) for box in boxes)
    raster = PackedLayout.from_grids([grid], tile_size=16)
    assert chosen < int(TileSchedule.build(raster, mask).by_query.end.max())
