"""TileSchedule: which tiles of the packed sequence meet which, from a layout and a mask, built on the device."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.packing._bundle import TensorBundle, may_read
from sora_fast.packing.coordinates import EVERYWHERE, MAX_GRID, packed
from sora_fast.packing.layout import PackedLayout
from sora_fast.schedule.tiles import TileLists, TokenRanges, has_ranges, list_room, tile_lists, token_ranges

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Places in a list, and the tiles after it, are numbered in int32.
_MOST_PAIRS = 1 << 30
# The largest int32: of −1, its bits are what is left without the sign.
_ALL = (1 << 31) - 1

# Fills in all tensors of a schedule but those of its layouts, which it is made from.
Filler = Callable[["TileSchedule"], None]
_fillers: list[Callable[[torch.device], Filler | None]] = []


def offer_filler(offer: Callable[[torch.device], Filler | None]) -> None:
    """Let schedules on a device be filled by what `offer` gives for it; None leaves them to plain PyTorch.

    For the packages above this one, which have kernels and know on which device they are proved.
    """
    _fillers.append(offer)


@dataclass(frozen=True, eq=False)
class TileSchedule(TensorBundle):
    """A mask over a layout, ready for a kernel; built once a batch, shared by all layers, heads and sampling steps.

    by_query: the keys that each query tile meets, as tiles or as ranges of tokens; by_key: the transpose.
    query_low, query_high [N] int32: the packed coordinates of the first and last key of each query's box.
    key_place [Nk] int32: the packed coordinate of each key, 0 for padding, EVERYWHERE for one without a place.
    overflow [] int64: pairs of tiles by which each of the two lists was too short (see `check`).
    cross: whether the keys have a layout of their own.
    `packing.coordinates.inside` says whether a key lies in a query's box.
    """

    mask: SpacetimeMask
    layout: PackedLayout
    kv_layout: PackedLayout
    by_query: TileLists | TokenRanges
    by_key: TileLists | TokenRanges
    query_low: Tensor
    query_high: Tensor
    key_place: Tensor
    overflow: Tensor
    cross: bool = False

    @staticmethod
    def build(
        layout: PackedLayout,
        mask: SpacetimeMask | None = None,
        *,
        kv_layout: PackedLayout | None = None,
        max_pairs: int = 1 << 24,
    ) -> "TileSchedule":
        """Decide every pair of tiles by interval arithmetic on their bounding boxes; never waits for the device.

        kv_layout: of the keys, where those are others: segment s of `layout` sees segment s of `kv_layout`. Under any
            mask but the full one both count their places on one grid a segment, of which each holds some tokens: new
            frames beside cached ones, for example (see `packing.frame_tokens`).
        max_pairs: room for so many pairs of tiles in each of the two lists. The default is enough for any mask over
            4,096 tiles, a pack of about 250k tokens. Tiles that find no room left visit all tiles from the first to
            the last that they meet, testing every pair of tokens from the first gap on: the same result but for the
            order of its sums, later.
            `overflow` says so, and `check` how much room there should be.

        Where the tokens that a tile meets lie side by side, under a full mask, and of self-attention in raster order
        under a causal one, no list is needed: O(T) for T tiles. Else it takes time O(Σ T_s²) over the segments on a CPU
        and by the kernels, O(T²) in plain PyTorch elsewhere, 8·min(T², max_pairs) bytes, and in plain PyTorch some
        150 MB more while it is built, whatever T, and some 300 bytes a token. (T²: query tiles times key tiles.)
        """
        mask = mask or SpacetimeMask.full()
        keys = kv_layout or layout
        _check(layout, mask, kv_layout, max_pairs)
        sizes = {"max_pairs": max_pairs, "cross": kv_layout is not None}
        fill = _filler(layout.device)
        if fill is None:
            return _plain(layout, keys, mask, **sizes)
        schedule = _unfilled(layout, keys, mask, **sizes)
        fill(schedule)
        return schedule

    @property
    def query_raster(self) -> Tensor:
        """[N] int32: up to which raster index a query sees, if the mask goes by it; without a place: all."""
        raster = self.layout.raster_index
        return raster & _ALL if self.layout.is_joint and self.mask.causal_tokens else raster

    @property
    def max_pairs(self) -> int:
        """Room for pairs of tiles in each of the two lists; 0 where there are none."""
        if isinstance(self.by_query, TokenRanges):
            return 0
        return self.by_query.tiles.shape[0] - self.kv_layout.max_tiles

    def refresh_(self, layout: PackedLayout, *, kv_layout: PackedLayout | None = None) -> "TileSchedule":
        """Make this the schedule of another batch of the same sizes, in the same memory; never waits for the device.

        For CUDA graphs and compiled steps, whose inputs stay where they are: a graph captured with this schedule then
        computes the new batch. `self.layout` and `self.kv_layout`, the very layouts that `build` was given, take over
        the content of the new ones too (unless those are the same, filled by the caller). Returns itself.

        Raises ValueError if a size, the device or the order differs, or a kv_layout is missing or too many.
        """
        if (kv_layout is not None) != self.cross:
            raise ValueError(
                f"kv_layout: {'missing' if self.cross else 'given'}; the schedule was built "
                f"{'with' if self.cross else 'without'} one"
            )
        if self.cross and (layout is self.kv_layout or kv_layout is self.layout):
            raise ValueError("layout, kv_layout: the schedule's own, exchanged; pass copies")
        _check(layout, self.mask, kv_layout, max_pairs=0)
        batches = [("layout", self.layout, layout), ("kv_layout", self.kv_layout, kv_layout or layout)]
        batches = batches[: 1 if self.kv_layout is self.layout else 2]
        for name, mine, new in batches:
            mine.check_like(name, new)
        for _, mine, new in batches:
            mine.copy_(new)
        fill = _filler(self.layout.device)
        if fill is None:
            sizes = {"max_pairs": self.max_pairs, "cross": self.cross}
            self.copy_(_plain(self.layout, self.kv_layout, self.mask, **sizes))
        else:
            fill(self)
        return self

    def check(self) -> None:
        """Warn, with the room that was needed, if `max_pairs` was too small for this batch: the results are right but
        come later. Waits for the device: look where you wait anyway, where you read the loss for example.
        """
        if missing := int(self.overflow):
            warnings.warn(
                f"TileSchedule: {self.max_pairs + missing} pairs of tiles meet, but max_pairs is {self.max_pairs}; "
                f"some tiles visit more than they must. Build it with max_pairs={self.max_pairs + missing} or more",
                RuntimeWarning,
                stacklevel=2,
            )

    def to_block_mask(self) -> "BlockMask":
        """The same mask for torch.nn.attention.flex_attention, over batch 1 and all heads.

        FlexAttention's blocks are 128 tokens from token 0 on, whatever segments they cut, so the blocks are decided
        anew, by the same arithmetic; its lists take some 16 bytes a pair of blocks. Queries without a key give zeros
        there too, but NaN in the padding is not kept out. Never waits for the device.
        """
        from sora_fast.schedule.flex import block_mask

        return block_mask(self)


def _check(layout: PackedLayout, mask: SpacetimeMask, kv_layout: PackedLayout | None, max_pairs: int) -> None:
    if not 0 <= max_pairs <= _MOST_PAIRS:
        raise ValueError(f"max_pairs: {max_pairs}; it must be from 0 to {_MOST_PAIRS}")
    if kv_layout is None:
        return
    if kv_layout.max_segments != layout.max_segments:
        raise ValueError(
            f"kv_layout: {kv_layout.max_segments} segments, but the layout has {layout.max_segments}; they must agree"
        )
    if kv_layout.device != layout.device:
        raise ValueError(f"kv_layout: on {kv_layout.device}, but the layout is on {layout.device}")
    if not mask.is_full and may_read(layout.grids):
        _check_grids(layout, kv_layout)


def _check_grids(layout: PackedLayout, kv_layout: PackedLayout) -> None:
    """Frames in a pack of their own, counted from 0, would meet the wrong keys."""
    both = (layout.cu_seqlens.diff() > 0) & (kv_layout.cu_seqlens.diff() > 0)
    wrong = both & (layout.grids != kv_layout.grids).any(dim=1)
    if wrong.any():
        segment = int(wrong.nonzero()[0])
        own, other = (tuple(side.grids[segment].tolist()) for side in (layout, kv_layout))
        raise ValueError(
            f"kv_layout: segment {segment} has the grid {other}, but {own} in the layout; under a mask both are parts "
            "of one grid: give `from_grids` the whole one, and which tokens there are as keep="
        )


def _filler(device: torch.device) -> Filler | None:
    return next((fill for offer in _fillers if (fill := offer(device))), None)


def _plain(
    layout: PackedLayout, keys: PackedLayout, mask: SpacetimeMask, *, max_pairs: int, cross: bool
) -> TileSchedule:
    if has_ranges(layout, mask, cross=cross):
        by_query = token_ranges(layout, keys, mask, by_key=False)
        by_key = token_ranges(keys, layout, mask, by_key=True)
        overflow = layout.cu_seqlens.new_zeros((), dtype=torch.int64)
    else:
        by_query, by_key, pairs = tile_lists(layout, keys, mask, max_pairs)
        overflow = (pairs - max_pairs).clamp(min=0)
    boxes = *_packed_bounds(layout, mask), _packed_places(keys)
    return TileSchedule(mask, layout, keys, by_query, by_key, *boxes, overflow, cross=cross)


def _unfilled(
    layout: PackedLayout, keys: PackedLayout, mask: SpacetimeMask, *, max_pairs: int, cross: bool
) -> TileSchedule:
    """Memory for what `_plain` gives. Places of a list that stay unused are 0 from the start."""
    new = layout.cu_seqlens.new_empty
    sides = []
    for count, others in ((layout.max_tiles, keys.max_tiles), (keys.max_tiles, layout.max_tiles)):
        numbers = [new(count) for _ in range(4)]
        if has_ranges(layout, mask, cross=cross):
            sides.append(TokenRanges(*numbers))
        else:
            room = list_room(count, others, max_pairs)
            sides.append(TileLists(*numbers, layout.cu_seqlens.new_zeros(room + others)))
    places = (new(size.capacity) for size in (layout, layout, keys))
    overflow = new((), dtype=torch.int64)
    return TileSchedule(mask, layout, keys, *sides, *places, overflow, cross=cross)


def _packed_places(layout: PackedLayout) -> Tensor:
    places = packed(*(layout.coords + 1).unbind(dim=1))
    if layout.is_joint:
        places = torch.where(layout.raster_index < 0, EVERYWHERE, places)
    return torch.where(layout.segment_ids >= 0, places, 0)


def _packed_bounds(layout: PackedLayout, mask: SpacetimeMask) -> tuple[Tensor, Tensor]:
    # Coordinates count from 1, so that 0 and limit + 1 stand for "before all" and "after all", and padding keys (0)
    # lie in no box. No last one is "after all": EVERYWHERE would not lie before it.
    first, last = mask.bounds(layout)
    low = [(first[:, axis] + 1).clamp(1, MAX_GRID[axis] + 1) for axis in range(3)]
    high = [(last[:, axis] + 1).clamp(0, MAX_GRID[axis]) for axis in range(3)]
    return packed(*low), packed(*high)
