"""unpatchify: packed tokens back to ragged latents, cropped to the videos' own sizes."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sora_fast.ops import _patches_compiled, _patches_torch
from sora_fast.ops._checks import FLOAT_DTYPES, check_device, check_dtype, check_layout, check_shape, may_read, once
from sora_fast.ops._dispatch import choose
from sora_fast.ops._op import kernels, op
from sora_fast.ops._patches import PatchSize, check_grids, check_order, check_patch_size, geometry, offered_patches
from sora_fast.packing import PackedLayout, RaggedLatents


def unpatchify(
    tokens: Tensor,
    layout: PackedLayout,
    patch_size: PatchSize,
    shapes: Tensor | RaggedLatents,
    *,
    capacity: int | None = None,
    order: str = "thwc",
    backend: str | None = None,
) -> RaggedLatents:
    """Put every token's patch where it belongs.

    tokens: [N, pt·ph·pw·Cout], each row laid out as `order` says; padding is not read.
    order: "thwc": (pt, ph, pw, Cout), as DiT's final layer has it; "cthw": (Cout, pt, ph, pw); "hwtc": (ph, pw, pt,
        Cout), which the compiled libraries do not move.
    shapes: [S, 4] int32 (C, T, H, W), or the latents that the tokens come from. C is ignored: the result has Cout.
    capacity: elements of the result's flat buffer, static; default with latents: theirs (right for Cout = C).
    Returns RaggedLatents in the dtype of tokens. What lies beyond a video's edge is cropped; the pixels of dropped
    tokens, and the buffer past the last video, are zeros. Differentiable in tokens.
    """
    _check(tokens, layout, patch_size, order)
    channels = channels_of("tokens columns", tokens.shape[1], patch_size)
    unsuited = _patches_compiled.unsuited(order)
    chosen = choose("unpatchify", backend, tokens.device, offered_patches(tokens), tokens.dtype, unsuited=unsuited)
    offsets, shapes, capacity = videos_of(channels, layout, patch_size, shapes, capacity, backend=chosen)
    if chosen != "triton":
        put = (_patches_torch if chosen == "torch" else _patches_compiled).put
        flat = put(tokens, offsets, shapes, layout, patch_size, capacity, order)
    else:
        flat = _unpatchify(tokens, *geometry(offsets, shapes, layout, patch_size), order, capacity)
    return RaggedLatents(flat, offsets, shapes)


_INTEGERS = (int, torch.SymInt, np.integer)  # not a union, which would be made anew in every call


def channels_of(what: str, count: int, patch_size: PatchSize) -> int:
    """Cout of so many columns or rows. ValueError, with `what` they are, if they are not whole patches."""
    pixels = math.prod(patch_size)
    channels, rest = count // pixels, count % pixels  # Dynamo cannot follow divmod of a symbolic size
    if rest or not channels:
        name, unit = what.split()
        raise ValueError(f"{name}: {count} {unit}; patches of {tuple(patch_size)} need {pixels}·Cout")
    return channels


def videos_of(
    channels: int,
    layout: PackedLayout,
    patch_size: PatchSize,
    shapes: Tensor | RaggedLatents,
    capacity: int | None,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, int]:
    """Offsets, shapes and capacity of videos of so many channels; shapes, capacity: as in `unpatchify`.

    backend: the chosen one. Made without waiting for the device. ValueError if they do not fit the layout, or each
    other.
    """
    if isinstance(shapes, RaggedLatents):
        capacity = shapes.flat.numel() if capacity is None else capacity
        shapes = shapes.shapes
    if not isinstance(shapes, Tensor):
        raise TypeError(f"shapes: {type(shapes).__name__}; it must be a tensor [S, 4], or RaggedLatents")
    if capacity is None:
        raise ValueError("capacity: None; it must be given when shapes is a tensor")
    if not isinstance(capacity, _INTEGERS):
        raise TypeError(f"capacity: {type(capacity).__name__}; it must be an int")
    check_grids(shapes, layout, patch_size)
    found = _read_videos(shapes, channels) if may_read(shapes) else None
    if found is not None and found[0][-1] > capacity:
        raise ValueError(f"capacity: {capacity} elements, but the videos have {int(found[0][-1])}")
    if backend == "triton":
        found = _videos(shapes, channels)
    return *(found or _plain_videos(shapes, channels)), capacity


def _read_videos(shapes: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """By numpy: a few numbers, for which PyTorch takes three times as long."""
    table = shapes.numpy().copy()
    pixels = table[:, 1:].prod(axis=1, dtype=np.int64)
    table[:, 0] = np.where(pixels > 0, channels, 0)
    offsets = np.zeros(len(table) + 1, dtype=np.int64)
    np.cumsum(pixels * channels, out=offsets[1:])
    return torch.from_numpy(offsets), torch.from_numpy(table)


def _plain_videos(shapes: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    sizes = shapes[:, 1:]
    pixels = sizes.prod(dim=1, dtype=torch.int64)
    offsets = torch.cat([pixels.new_zeros(1), (pixels * channels).cumsum(0)])
    channel = ((pixels > 0) * channels).to(shapes.dtype)
    return offsets, torch.cat([channel[:, None], sizes], dim=1)


@op("sora_fast::videos")
def _videos(shapes: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    return kernels("_patches").videos(shapes, channels)


@_videos.register_fake
def _(shapes: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    return shapes.new_empty(shapes.shape[0] + 1, dtype=torch.int64), shapes.new_empty(shapes.shape)


@op("sora_fast::unpatchify")
def _unpatchify(
    tokens: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    segment_ids: Tensor,
    coords: Tensor,
    patch_size: list[int],
    order: str,
    capacity: int,
) -> Tensor:
    patches = kernels("_patches").Patches(offsets, shapes, segment_ids, coords, tuple(patch_size))
    return kernels("unpatchify").scatter(tokens, patches, capacity, order)


@op("sora_fast::unpatchify_backward")
def _unpatchify_backward(
    flat: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    segment_ids: Tensor,
    coords: Tensor,
    patch_size: list[int],
    order: str,
    num_pixels: int,
) -> Tensor:
    patches = kernels("_patches").Patches(offsets, shapes, segment_ids, coords, tuple(patch_size))
    return kernels("unpatchify").gather(flat, patches, num_pixels, order)


@_unpatchify.register_fake
def _(tokens: Tensor, *rest: Any) -> Tensor:
    return tokens.new_empty(rest[-1])


@_unpatchify_backward.register_fake
def _(flat: Tensor, offsets: Tensor, shapes: Tensor, segment_ids: Tensor, *rest: Any) -> Tensor:
    return flat.new_empty(segment_ids.shape[0], rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, *geometry, ctx.patch_size, ctx.order, _ = inputs
    ctx.save_for_backward(*geometry)
    ctx.num_pixels = tokens.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _unpatchify_backward(grad, *ctx.saved_tensors, ctx.patch_size, ctx.order, ctx.num_pixels), *[None] * 7


_unpatchify.register_autograd(_backward, setup_context=_save)


@once
def _check(tokens: Tensor, layout: PackedLayout, patch_size: PatchSize, order: str) -> None:
    check_order(order)
    check_patch_size(patch_size)
    check_layout(layout)
    check_shape("tokens", tokens, [layout.capacity, f"{math.prod(patch_size)}·Cout"])
    check_dtype("tokens", tokens, FLOAT_DTYPES)
    check_device("tokens", tokens, "the layout", layout.device)
