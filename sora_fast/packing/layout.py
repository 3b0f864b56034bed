"""PackedLayout: where every token of a packed batch lies, as a few int32 tensors of static shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.packing._bundle import TensorBundle
from sora_fast.packing.coordinates import MAX_GRID
from sora_fast.packing.order import Grid, choose_box, order_segment


@dataclass(frozen=True, eq=False)
class PackedLayout(TensorBundle):
    """A packed batch of up to S segments (videos, images, texts) in a sequence of N tokens.

    All tensors are int32 and their shapes depend on the capacities only, never on the content.

    cu_seqlens [S+1]: first token of every segment, then the end; unused segments repeat the last offset.
    grids [S, 3]: token grid (T, H, W); zeros for unused segments.
    segment_ids [N]: segment of every token, −1 past the end.
    coords [N, 3]: (t, h, w) of every token; zeros past the end.
    raster_index [N]: place of the token in its full grid, t·H·W + h·W + w; zero past the end.
    tile_offsets [T+1]: the packed sequence cut into tiles of at most `tile_size` consecutive tokens of one segment;
        unused tiles repeat the last offset.
    is_raster: the tokens of every segment lie in raster order, so that under a causal mask those that a tile may
        attend lie side by side. Static: it follows from the order asked for, never from a batch.
    is_joint: some tokens have no place in the grid, those of a text beside its video (see `JointLayout`). Their raster
        index is −1; under any mask they see all of their segment, and all of it sees them. They have tiles of their
        own. Static.
    """

    cu_seqlens: Tensor
    grids: Tensor
    segment_ids: Tensor
    coords: Tensor
    raster_index: Tensor
    tile_offsets: Tensor
    tile_size: int = 128
    is_raster: bool = False
    is_joint: bool = False

    @property
    def capacity(self) -> int:
        """N, the static length of the packed sequence."""
        return self.segment_ids.shape[0]

    @property
    def max_segments(self) -> int:
        """S, the static number of segments."""
        return self.grids.shape[0]

    @property
    def max_tiles(self) -> int:
        """T, the static number of tiles."""
        return self.tile_offsets.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """Device of every tensor of the layout."""
        return self.segment_ids.device

    @staticmethod
    def from_grids(
        grids: Sequence[Grid],
        *,
        order: str = "raster",
        box: Grid | None = None,
        for_mask: SpacetimeMask | None = None,
        capacity: int | None = None,
        max_segments: int | None = None,
        keep: Sequence[np.ndarray | Tensor | None] | None = None,
        device: torch.device | str | None = None,
        tile_size: int = 128,
    ) -> "PackedLayout":
        """Lay out one segment after the other.

        grids: token grid (T, H, W) of each segment; a grid with a zero is an empty segment.
        order: "raster", or "tiled": small 3D boxes, so that a tile is compact in space and time.
        box: the box (t, h, w) of the tiled order for all segments; None chooses one per segment, the best for
            `for_mask` (fewest visited tile pairs), or compact and full ones without it.
        capacity, max_segments: static sizes; default: exactly what the batch needs, at least one segment.
        keep: per segment, the raster indices of the tokens that stay (any order; None keeps all).
        tile_size: most tokens in a tile; a power of two from 16 to 128.

        Raises ValueError if the batch does not fit the capacities or an argument is out of range.
        """
        grids = [_checked_grid(index, grid) for index, grid in enumerate(grids)]
        _check_options(order, box, tile_size)
        kept = [None] * len(grids) if keep is None else [_checked_keep(i, k, grids[i]) for i, k in _paired(keep, grids)]
        max_segments = _fitted("max_segments", max_segments, max(len(grids), 1), "segments")
        lengths = [math.prod(grid) if k is None else len(k) for grid, k in zip(grids, kept, strict=True)]
        capacity = _fitted("capacity", capacity, sum(lengths), "tokens")

        cu_seqlens = np.full(max_segments + 1, sum(lengths), dtype=np.int32)
        cu_seqlens[: len(grids) + 1] = np.cumsum([0, *lengths])
        segment_ids = np.full(capacity, -1, dtype=np.int32)
        coords = np.zeros((capacity, 3), dtype=np.int32)
        raster_index = np.zeros(capacity, dtype=np.int32)
        tile_sizes: list[np.ndarray] = []
        for segment, (grid, k) in enumerate(zip(grids, kept, strict=True)):
            if lengths[segment] == 0:
                continue
            used = None if order == "raster" else _clipped(box, grid) or choose_box(grid, tile_size, for_mask)
            raster, sizes = order_segment(grid, used, tile_size, k)
            place = slice(cu_seqlens[segment], cu_seqlens[segment + 1])
            segment_ids[place] = segment
            raster_index[place] = raster
            coords[place] = np.stack(np.unravel_index(raster, grid), axis=1)
            tile_sizes.append(sizes)
        # At most 2 L / tile_size + 1 tiles in a segment of L tokens (see order.order_segment).
        tile_offsets = np.full(2 * capacity // tile_size + max_segments + 1, sum(lengths), dtype=np.int32)
        offsets = np.cumsum(np.concatenate([[0], *tile_sizes]))
        tile_offsets[: len(offsets)] = offsets
        tensors = (
            cu_seqlens,
            _padded_grids(grids, max_segments),
            segment_ids,
            coords,
            raster_index,
            tile_offsets,
        )
        return PackedLayout(
            *(torch.from_numpy(array).to(device or "cpu") for array in tensors),
            tile_size=tile_size,
            is_raster=order == "raster",
        )

    def tile_ids(self) -> Tensor:
        """[N] int32: tile of every token; padding tokens get the number of used tiles or more."""
        tokens = torch.arange(self.capacity, dtype=torch.int32, device=self.device)
        return torch.searchsorted(self.tile_offsets, tokens, right=True, out_int32=True) - 1


def frame_tokens(grid: Grid, first: int, end: int) -> np.ndarray:
    """Raster indices of the frames first … end − 1 of a grid (T, H, W): what `keep` takes for a part of a longer video.

    The tokens have their places in the whole video, whose length may be any that it will not exceed. So new frames can
    attend cached ones under a mask (`packed_attention` with kv_layout).
    """
    if not 0 <= first <= end <= grid[0]:
        raise ValueError(f"first, end: {first}, {end}; it must be 0 ≤ first ≤ end ≤ {grid[0]}, the frames of the grid")
    return np.arange(first * grid[1] * grid[2], end * grid[1] * grid[2])


def token_grid(shape: Sequence[int], patch_size: Grid) -> Grid:
    """Token grid (T, H, W) of latents (C, T, H, W): sizes that the patch does not divide are rounded up."""
    frames, height, width = (-(-size // patch) for size, patch in zip(shape[1:], patch_size, strict=True))
    return frames, height, width


def _checked_grid(index: int, grid: Grid) -> Grid:
    sizes = tuple(int(size) for size in grid)
    if len(sizes) != 3 or min(sizes) < 0:
        raise ValueError(f"grids: segment {index} has the grid {tuple(grid)}; it must be three sizes (T, H, W) ≥ 0")
    if any(size > limit for size, limit in zip(sizes, MAX_GRID, strict=True)):
        raise ValueError(f"grids: segment {index} has the grid {sizes}; the largest possible is {MAX_GRID} patches")
    return sizes


def _paired(keep: Sequence[np.ndarray | Tensor | None], grids: list[Grid]) -> enumerate:
    if len(keep) != len(grids):
        raise ValueError(f"keep: {len(keep)} entries for {len(grids)} grids; it must have one a segment")
    return enumerate(keep)


def _checked_keep(index: int, keep: np.ndarray | Tensor | None, grid: Grid) -> np.ndarray | None:
    if keep is None:
        return None
    array = np.asarray(keep)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"keep: segment {index} has {array.dtype}; it must be integers, the raster indices that stay")
    array = np.sort(array.astype(np.int64))
    if array.ndim != 1 or len(np.unique(array)) != len(array):
        raise ValueError(f"keep: segment {index} names tokens twice or is not one-dimensional (shape {array.shape})")
    if len(array) and (array[0] < 0 or array[-1] >= math.prod(grid)):
        raise ValueError(
            f"keep: segment {index} names tokens {array[0]} … {array[-1]}; its grid {grid} has {math.prod(grid)}"
        )
    return array


def _check_options(order: str, box: Grid | None, tile_size: int) -> None:
    if order not in ("raster", "tiled"):
        raise ValueError(f'order: {order!r}; it must be "raster" or "tiled"')
    if tile_size not in (16, 32, 64, 128):
        raise ValueError(f"tile_size: {tile_size}; it must be 16, 32, 64 or 128")
    if box is not None and order != "tiled":
        raise ValueError(f'box: {box} with order={order!r}; only order="tiled" has boxes')
    if box is not None and (len(box) != 3 or min(box) < 1 or math.prod(box) > tile_size):
        raise ValueError(f"box: {box}; it must be three sizes ≥ 1 of at most {tile_size} tokens together")


def _clipped(box: Grid | None, grid: Grid) -> Grid | None:
    return box and tuple(min(size, extent) for size, extent in zip(box, grid, strict=True))


def _fitted(name: str, given: int | None, needed: int, unit: str) -> int:
    if given is not None and given < needed:
        raise ValueError(f"{name}: {given}, but the batch has {needed} {unit}")
    return needed if given is None else given


def _padded_grids(grids: list[Grid], max_segments: int) -> np.ndarray:
    padded = np.zeros((max_segments, 3), dtype=np.int32)
    if grids:
        padded[: len(grids)] = grids
    return padded
