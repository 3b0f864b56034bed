"""TileSchedules filled by Triton kernels, where those are proved or asked for: the numbers are the same everywhere."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.ops._dispatch import choose
from sora_fast.packing import PackedLayout
from sora_fast.schedule import Filler, TileLists, TileSchedule, TokenRanges

# Beyond every coordinate and every anchor; added to either it stays an int32.
_UNBOUNDED = 1 << 30


def filler(device: torch.device) -> Filler | None:
    """What `sora_fast.schedule.offer_filler` takes."""
    return _fill if choose("schedule", None, device) == "triton" else None


def _fill(schedule: TileSchedule) -> None:
    layout, keys, mask = schedule.layout, schedule.kv_layout, schedule.mask
    places = [schedule.query_low, schedule.query_high, schedule.key_place, schedule.overflow]
    _fill_op(
        _tensors(layout),
        _tensors(keys) if schedule.cross else [],
        places,
        _tensors(schedule.by_query),
        _tensors(schedule.by_key),
        _axes(mask),
        mask.is_full,
        mask.causal_tokens,
        [layout.is_joint, keys.is_joint],
        [layout.tile_size, keys.tile_size],
        schedule.max_pairs,
    )


def _tensors(bundle: PackedLayout | TokenRanges | TileLists) -> list[Tensor]:
    values = (getattr(bundle, field.name) for field in fields(bundle))
    return [value for value in values if isinstance(value, Tensor)]


def _axes(mask: SpacetimeMask) -> list[int]:
    """low, high, stride, clamp of t, of h and of w."""
    numbers: list[int] = []
    for axis, (stride, clamp) in enumerate(zip(mask.stride, mask.clamp, strict=True)):
        low, high = mask.interval(axis)
        numbers += [-_UNBOUNDED if low is None else low, _UNBOUNDED if high is None else high, stride, int(clamp)]
    return numbers


@torch.library.custom_op("sora_fast::fill_schedule", mutates_args=("places", "by_query", "by_key"))
def _fill_op(
    queries: list[Tensor],
    keys: list[Tensor],
    places: list[Tensor],
    by_query: list[Tensor],
    by_key: list[Tensor],
    axes: list[int],
    full: bool,
    causal: bool,
    joint: list[bool],
    tile_sizes: list[int],
    max_pairs: int,
) -> None:
    from sora_fast.kernels.schedule import Axis, Lists, Pack, Places, Ranges, fill

    *placed, overflow = places
    side = Lists if len(by_query) == len(Lists._fields) else Ranges
    along = [Axis(*axes[4 * axis : 4 * axis + 3], clamp=bool(axes[4 * axis + 3])) for axis in range(3)]
    fill(
        Pack(*queries),
        Pack(*keys) if keys else None,
        Places(*placed),
        side(*by_query),
        side(*by_key),
        overflow,
        axes=tuple(along),
        full=full,
        causal=causal,
        joint=tuple(joint),
        tile_sizes=tuple(tile_sizes),
        max_pairs=max_pairs,
    )


@_fill_op.register_fake
def _(*_: Any) -> None:
    pass
