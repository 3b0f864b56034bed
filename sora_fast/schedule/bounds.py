"""Interval arithmetic on groups of tokens: which groups a mask lets meet, decided from their bounding boxes."""

from typing import NamedTuple

import torch
from torch import Tensor

from sora_fast.masks import UNBOUNDED, SpacetimeMask
from sora_fast.packing.layout import PackedLayout

# Beyond every coordinate, segment and raster index.
_FAR = torch.iinfo(torch.int32).max

Extremes = tuple[Tensor, Tensor]


class Groups(NamedTuple):
    """A partition of a layout's tokens. ids [N] int64: group of every token, `count` for those of none."""

    layout: PackedLayout
    ids: Tensor
    count: int

    @staticmethod
    def tiles(layout: PackedLayout) -> "Groups":
        """The layout's own tiles."""
        return _groups(layout, layout.tile_ids(), layout.max_tiles)

    @staticmethod
    def blocks(layout: PackedLayout, size: int) -> "Groups":
        """Blocks of `size` tokens, counted from token 0: a block may hold several segments."""
        tokens = torch.arange(layout.capacity, device=layout.device)
        return _groups(layout, tokens // size, -(-layout.capacity // size))


def _groups(layout: PackedLayout, ids: Tensor, count: int) -> Groups:
    return Groups(layout, torch.where(layout.segment_ids >= 0, ids, count).long(), count)


class Bounds(NamedTuple):
    """Least and greatest number [G, A] in each group on A axes: the segment, those of t, h, w on which the mask forbids
    anything and, if it is causal, the raster order.

    key: where the group's tokens lie as keys. low, high: first and last place that they may attend as queries. Groups
    without a token have bounds that meet nothing.
    seen [G] bool: groups with a key that lies nowhere, whom all of its segment sees; None: there is none.
    """

    key: Extremes
    low: Extremes
    high: Extremes
    seen: Tensor | None = None

    @staticmethod
    def of(queries: Groups, keys: Groups, mask: SpacetimeMask) -> "Bounds":
        """For queries and keys of one layout or of two, whose places then are of one grid a segment."""
        layout = queries.layout
        axes = [slice(a, a + 1) for a, bound in enumerate((mask.t, mask.h, mask.w)) if bound != UNBOUNDED]
        first, last = mask.bounds(layout)
        segment = layout.segment_ids[:, None]
        key = [keys.layout.segment_ids[:, None], *(keys.layout.coords[:, axis] for axis in axes)]
        low, high = ([segment, *(bound[:, axis] for axis in axes)] for bound in (first, last))
        if mask.causal_tokens:
            raster = layout.raster_index[:, None] & _FAR  # −1, of what lies nowhere, is behind all
            key = [*key, keys.layout.raster_index[:, None]]
            low, high = [*low, torch.zeros_like(raster)], [*high, raster]
        of_keys = _key_extremes(key, keys) if keys.layout.is_joint else (_extremes(key, keys), None)
        return Bounds(of_keys[0], _extremes(low, queries), _extremes(high, queries), of_keys[1])

    def decide(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """Boolean matrices, query group by key group: which pairs meet (perhaps), and which of those entirely."""
        meets = full = None
        for axis in range(self.key[0].shape[1]):
            key_min, key_max = (bound[None, keys, axis] for bound in self.key)
            low_min, low_max = (bound[queries, None, axis] for bound in self.low)
            high_min, high_max = (bound[queries, None, axis] for bound in self.high)
            touches = (key_max >= low_min) & (key_min <= high_max)
            holds = (key_min >= low_max) & (key_max <= high_min)
            if axis > 0 and self.seen is not None:
                touches = touches | self.seen[None, keys]
            meets = touches if meets is None else meets & touches
            full = holds if full is None else full & holds
        return meets, full & meets


def _key_extremes(axes: list[Tensor], keys: Groups) -> tuple[Extremes, Tensor]:
    """`Bounds.key` and `Bounds.seen` of a joint layout: what lies nowhere has a segment and no other number."""
    unplaced = keys.layout.raster_index < 0
    placed = keys._replace(ids=torch.where(unplaced, keys.count, keys.ids))
    parts = [_extremes(axes[:1], keys), *(_extremes([axis], placed) for axis in axes[1:])]
    seen = torch.zeros(keys.count + 1, dtype=torch.bool, device=keys.ids.device)
    seen = seen.index_fill(0, torch.where(unplaced, keys.ids, keys.count), True)
    return tuple(torch.cat(bounds, dim=1) for bounds in zip(*parts, strict=True)), seen[:-1]


def _extremes(axes: list[Tensor], groups: Groups) -> Extremes:
    """Least and greatest of the values [N, A] of each group's tokens; if it has none, the greatest is less."""
    values = torch.cat(axes, dim=1)
    index = groups.ids[:, None].expand_as(values)
    shape = (groups.count + 1, values.shape[1])
    low = values.new_full(shape, _FAR).scatter_reduce(0, index, values, "amin")
    high = values.new_full(shape, -_FAR).scatter_reduce(0, index, values, "amax")
    return low[:-1], high[:-1]
