"""Random ragged layouts, shared by the tests of everything that takes a layout."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from sora_fast.masks import SpacetimeMask
from sora_fast.packing import PackedLayout, frame_tokens

SIDES = st.sampled_from([0, 1, 1, 2, 3, 5, 6])
GRIDS = st.tuples(SIDES, SIDES, SIDES)

RADII = st.sampled_from([None, 0, 1, 2, 3])
INTERVALS = st.tuples(RADII.map(lambda r: r and -r), RADII)
STRIDES = st.tuples(*[st.sampled_from([1, 1, 2, 3])] * 3)
MASKS = st.one_of(
    st.sampled_from(
        [
            SpacetimeMask.full(),
            SpacetimeMask.frame_causal(),
            SpacetimeMask.spatial(),
            SpacetimeMask.temporal(),
            SpacetimeMask.token_causal(),
        ]
    ),
    st.builds(SpacetimeMask.window, RADII, RADII, RADII, stride=STRIDES, clamp=st.booleans()),
    st.builds(SpacetimeMask.window, RADII, RADII, RADII, causal=st.just(True), clamp=st.booleans()),
    st.builds(SpacetimeMask, INTERVALS, INTERVALS, INTERVALS, causal_tokens=st.booleans()),
    # Boxes that do not contain the query: some queries have no key at all.
    st.just(SpacetimeMask(t=(1, 2), h=(-3, -1))),
)


@dataclass(frozen=True)
class Pack:
    """A layout and what it was made from."""

    layout: PackedLayout
    grids: list[tuple[int, int, int]]
    keep: list[np.ndarray] | None


@st.composite
def packs(draw: st.DrawFn, *, tile_sizes: tuple[int, ...] = (16,), max_grids: int = 4, mask=None) -> Pack:
    """Layouts with empty and one-token segments, both orders, dropping, unused segments and padding."""
    grids = draw(st.lists(GRIDS, max_size=max_grids))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    keep = None
    if draw(st.booleans()):
        sizes = [int(np.prod(grid)) for grid in grids]
        keep = [rng.permutation(size)[: rng.integers(0, size + 1)] for size in sizes]
    tokens = sum(int(np.prod(grid)) if keep is None else len(keep[i]) for i, grid in enumerate(grids))
    layout = PackedLayout.from_grids(
        grids,
        order=draw(st.sampled_from(["raster", "tiled"])),
        for_mask=mask,
        capacity=tokens + draw(st.integers(0, 20)),
        max_segments=max(1, len(grids) + draw(st.integers(0, 2))),
        keep=keep,
        tile_size=draw(st.sampled_from(tile_sizes)),
    )
    return Pack(layout, grids, keep)


@st.composite
def part_pairs(draw: st.DrawFn, *, max_grids: int = 3) -> tuple[PackedLayout, PackedLayout]:
    """Two layouts that hold other parts of the same grids, in orders, tiles and paddings of their own.

    Any part may be empty, the whole, or some of the other; scattered tokens or whole frames.
    """
    grids = draw(st.lists(GRIDS, max_size=max_grids))
    segments = max(1, len(grids) + draw(st.integers(0, 1)))
    sides = []
    for _ in range(2):
        rng = np.random.default_rng(draw(st.integers(0, 2**31)))
        keep = [_part(grid, rng) for grid in grids]
        sides.append(
            PackedLayout.from_grids(
                grids,
                order=draw(st.sampled_from(["raster", "tiled"])),
                capacity=sum(map(len, keep)) + draw(st.integers(0, 20)),
                max_segments=segments,
                keep=keep,
                tile_size=draw(st.sampled_from([16, 32])),
            )
        )
    return sides[0], sides[1]


def _part(grid: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    if rng.integers(0, 2):
        first, end = sorted(rng.integers(0, grid[0] + 1, 2))
        return frame_tokens(grid, int(first), int(end))
    size = int(np.prod(grid))
    return rng.permutation(size)[: rng.choice([0, size, rng.integers(0, size + 1)])]
