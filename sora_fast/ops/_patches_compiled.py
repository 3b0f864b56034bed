"""Patches of ragged latents to rows of tokens and back, by the compiled libraries: C++ on a CPU, CUDA C++ on a GPU.

Both ops only move numbers, so that what they return is the torch backend's to the bit; each is the other's gradient.
"""

import math
from typing import Any

from torch import Tensor

from sora_fast.ops import _library
from sora_fast.ops._op import op
from sora_fast.ops._patches import PatchSize, geometry
from sora_fast.packing import PackedLayout


def cut(
    flat: Tensor, offsets: Tensor, shapes: Tensor, layout: PackedLayout, patch_size: PatchSize, channels: int
) -> Tensor:
    """As `_patches_torch.cut`."""
    return _gather(flat, *_geometry(offsets, shapes, layout, patch_size), channels * math.prod(patch_size), False)


def put(
    patches: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    layout: PackedLayout,
    patch_size: PatchSize,
    capacity: int,
    order: str = "thwc",
) -> Tensor:
    """As `_patches_torch.put`, for an order that is not `unsuited`."""
    return _scatter(patches, *_geometry(offsets, shapes, layout, patch_size), capacity, order == "thwc")


def unsuited(order: str) -> tuple[tuple[str, str], ...]:
    """The libraries' backends, each with the reason, if they do not move rows of this order: csrc/patches.h has two."""
    if order in ("cthw", "thwc"):
        return ()
    return tuple((backend, f"the compiled libraries have no order {order}") for backend in ("cpu", "cuda"))


def _geometry(
    offsets: Tensor, shapes: Tensor, layout: PackedLayout, patch_size: PatchSize
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    return geometry(offsets, shapes.int(), layout, patch_size)


@op("sora_fast::gather_patches")
def _gather(
    flat: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    segment_ids: Tensor,
    coords: Tensor,
    patch_size: list[int],
    columns: int,
    channel_last: bool,
) -> Tensor:
    rows = flat.new_empty(segment_ids.shape[0], columns)
    _library.function("gather_patches")(flat, offsets, shapes, segment_ids, coords, *patch_size, channel_last, rows)
    return rows


@op("sora_fast::scatter_patches")
def _scatter(
    rows: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    segment_ids: Tensor,
    coords: Tensor,
    patch_size: list[int],
    capacity: int,
    channel_last: bool,
) -> Tensor:
    flat = rows.new_empty(capacity)
    _library.function("scatter_patches")(rows, offsets, shapes, segment_ids, coords, *patch_size, channel_last, flat)
    return flat


@_gather.register_fake
def _(flat: Tensor, *rest: Any) -> Tensor:
    segment_ids, columns = rest[2], rest[5]
    return flat.new_empty(segment_ids.shape[0], columns)


@_scatter.register_fake
def _(rows: Tensor, *rest: Any) -> Tensor:
    return rows.new_empty(rest[5])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    moved, *geometry, ctx.patch_size, _, ctx.channel_last = inputs
    ctx.save_for_backward(*geometry)
    ctx.size = moved.shape[-1]


def _backward_of_gather(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _scatter(grad, *ctx.saved_tensors, ctx.patch_size, ctx.size, ctx.channel_last), *[None] * 7


def _backward_of_scatter(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gather(grad, *ctx.saved_tensors, ctx.patch_size, ctx.size, ctx.channel_last), *[None] * 7


_gather.register_autograd(_backward_of_gather, setup_context=_save)
_scatter.register_autograd(_backward_of_scatter, setup_context=_save)
