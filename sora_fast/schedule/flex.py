"""A TileSchedule as a BlockMask of FlexAttention."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sora_fast.packing.coordinates import inside
from sora_fast.schedule.bounds import Bounds, Groups

if TYPE_CHECKING:
    from sora_fast.schedule.tile_schedule import TileSchedule

# Tokens in a block of FlexAttention.
_BLOCK = 128


def block_mask(schedule: "TileSchedule") -> BlockMask:
    """What `TileSchedule.to_block_mask` gives."""
    queries, keys = (Groups.blocks(layout, _BLOCK) for layout in (schedule.layout, schedule.kv_layout))
    meets, full = Bounds.of(queries, keys, schedule.mask).decide(slice(None), slice(None))
    full &= _without_padding(queries)[:, None] & _without_padding(keys)
    return BlockMask.from_kv_blocks(
        *_listed(meets & ~full),
        *_listed(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_mask_mod(schedule),
        seq_lengths=(schedule.layout.capacity, schedule.kv_layout.capacity),
    )


def _without_padding(blocks: Groups) -> Tensor:
    ends = torch.arange(1, blocks.count + 1, device=blocks.ids.device) * _BLOCK
    return ends <= blocks.layout.cu_seqlens[-1]


def _listed(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """A boolean matrix as FlexAttention wants it: how many columns of each row are true, and first of all which."""
    columns = torch.sort(pairs.to(torch.int8), dim=1, descending=True, stable=True)[1]
    return pairs.sum(dim=1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]


def _mask_mod(schedule: "TileSchedule") -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    segments, key_segments = schedule.layout.segment_ids, schedule.kv_layout.segment_ids
    low, high, place = schedule.query_low, schedule.query_high, schedule.key_place
    raster, key_raster = schedule.query_raster, schedule.kv_layout.raster_index
    causal = schedule.mask.causal_tokens

    def allows(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        boxed = inside(place[key], low[query], high[query])
        allowed = (segments[query] == key_segments[key]) & (segments[query] >= 0) & boxed
        return allowed & (key_raster[key] <= raster[query]) if causal else allowed

    return allows
