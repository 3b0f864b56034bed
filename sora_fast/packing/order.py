"""Token orders: where in the packed sequence a segment's tokens lie, and where its tiles end.

Attention does not care about the order of tokens, so it is chosen for locality: in the `tiled` order a tile (at most
`tile_size` consecutive tokens) covers a small 3D box of the grid, and a local mask meets few tiles.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask

Grid = tuple[int, int, int]


@lru_cache(maxsize=4096)
def choose_box(grid: Grid, tile_size: int, mask: SpacetimeMask | None) -> Grid:
    """The box (t, h, w) of at most `tile_size` tokens that makes this grid's schedule cheapest.

    Given a local mask the cost is the number of tile pairs that it visits, which for intervals is the product of three
    counts, one an axis. Without one it is the number of tiles times the tokens within reach of a box: full tiles, and
    compact ones. Ties go to the box of least surface.
    """
    boxes = _candidate_boxes(grid, tile_size)
    extents = np.asarray(grid)
    tiles = np.prod(-(-extents // boxes), axis=1).astype(np.float64)
    reach = np.prod(np.minimum(boxes + 2 * _REACH, extents), axis=1)
    if mask is None or mask.is_full:
        cost = tiles * reach
    else:
        cost = np.ones(len(boxes))
        for axis in range(3):
            sizes = range(1, boxes[:, axis].max() + 1)
            counts = np.array([0, *(_visited(mask, axis, grid[axis], size) for size in sizes)])
            cost *= counts[boxes[:, axis]]
    return tuple(int(size) for size in boxes[np.lexsort((reach, tiles, cost))[0]])


# Tokens on each side of a box that count as its neighbourhood when no mask says which do: the radius of the smallest
# windows in use. It keeps 3x5x8 ahead of the fuller but elongated 7x9x2 on a 21x45x80 grid.
_REACH = 2


@lru_cache(maxsize=4096)
def _candidate_boxes(grid: Grid, tile_size: int) -> np.ndarray:
    sizes = [np.arange(1, min(extent, tile_size) + 1) for extent in grid]
    pairs = np.stack([sizes.ravel() for sizes in np.meshgrid(*sizes[:2], indexing="ij")], axis=1)
    pairs = pairs[pairs.prod(axis=1) <= tile_size]
    found = []
    for t_size, h_size in pairs:
        w_size = np.arange(1, min(grid[2], tile_size // (t_size * h_size)) + 1)
        found.append(np.stack([np.full_like(w_size, t_size), np.full_like(w_size, h_size), w_size], axis=1))
    return np.concatenate(found)


@lru_cache(maxsize=65536)
def _visited(mask: SpacetimeMask, axis: int, extent: int, size: int) -> int:
    """How many (query box, key box) pairs one axis contributes when it is cut into boxes of `size`."""
    low, high = mask.axis_bounds(axis, np.arange(extent), extent)
    starts = np.arange(0, extent, size)
    first = np.minimum.reduceat(low, starts).clip(0, extent - 1) // size
    last = np.maximum.reduceat(high, starts).clip(0, extent - 1) // size
    return int((last - first + 1).sum())


def order_segment(
    grid: Grid, box: Grid | None, tile_size: int, keep: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """One segment's tokens as raster indices in packed order, and the lengths of its tiles.

    `box` None is the raster order cut every `tile_size` tokens. Neighbouring boxes that fit into one tile together (at
    the grid's edge, or thinned by `keep`) share it, so a segment of L tokens has at most 2 L / tile_size + 1 tiles.
    """
    if keep is None:
        return _order_whole(grid, box, tile_size)
    return _order(grid, box, tile_size, keep)


@lru_cache(maxsize=256)
def _order_whole(grid: Grid, box: Grid | None, tile_size: int) -> tuple[np.ndarray, np.ndarray]:
    return _order(grid, box, tile_size, np.arange(math.prod(grid)))


def _order(grid: Grid, box: Grid | None, tile_size: int, raster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if box is None:
        starts = np.arange(0, len(raster), tile_size)
        return raster, np.diff(np.append(starts, len(raster)))
    t, h, w = np.unravel_index(raster, grid)
    columns, rows = -(-grid[2] // box[2]), -(-grid[1] // box[1])
    box_index = (t // box[0] * rows + h // box[1]) * columns + w // box[2]
    order = np.argsort(box_index, kind="stable")
    sizes = np.unique(box_index, return_counts=True)[1]
    return raster[order], _merge(sizes, tile_size)


def _merge(sizes: np.ndarray, tile_size: int) -> np.ndarray:
    tiles: list[int] = []
    for size in sizes.tolist():
        if tiles and tiles[-1] + size <= tile_size:
            tiles[-1] += size
        else:
            tiles.append(size)
    return np.array(tiles, dtype=np.int64)


def cut_tiles(cu_seqlens: Tensor, *, capacity: int, tile_size: int) -> Tensor:
    """[T+1] int32: every segment cut each `tile_size` tokens, on the device; as much room as a layout has for tiles."""
    lengths = cu_seqlens.diff()
    tiles = (lengths + tile_size - 1) // tile_size
    first_tile = torch.cat([torch.zeros_like(tiles[:1]), tiles.cumsum(0, dtype=torch.int32)])
    numbers = torch.arange(2 * capacity // tile_size + len(lengths) + 1, dtype=torch.int32, device=tiles.device)
    segments = torch.searchsorted(first_tile, numbers, right=True, out_int32=True) - 1
    offsets = cu_seqlens[segments] + (numbers - first_tile[segments]) * tile_size
    return torch.minimum(offsets, cu_seqlens[-1])
