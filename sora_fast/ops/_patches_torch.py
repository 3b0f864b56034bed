"""Patches of ragged latents to rows of tokens and back, and the linear map of those rows, in plain PyTorch.

On a CPU videos are cut up and put together one by one, and only rows that belong to a token are multiplied: that reads
the layout, which needs ops of their own for `torch.compile` to see no values. Elsewhere it would wait for the device:
there every pixel's element is computed.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.ops._op import op
from sora_fast.ops._patches import PatchSize, pixel_index, reordered
from sora_fast.packing import PackedLayout


def cut(
    flat: Tensor, offsets: Tensor, shapes: Tensor, layout: PackedLayout, patch_size: PatchSize, channels: int
) -> Tensor:
    """[N, channels·pt·ph·pw]: the patch of every token, laid out (channels, pt, ph, pw); zeros for padding and beyond a
    video's edge.

    flat, offsets, shapes: as in RaggedLatents.
    """
    if flat.device.type != "cpu":
        return gathered(flat, offsets, shapes, layout, patch_size, channels)
    places = (offsets, shapes, *_of(layout), list(patch_size))
    return _cut(flat, *places, channels * math.prod(patch_size), "cthw")


def put(
    patches: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    layout: PackedLayout,
    patch_size: PatchSize,
    capacity: int,
    order: str = "thwc",
) -> Tensor:
    """[capacity]: the inverse of `cut`, but for patches laid out in `order`; zeros where no token's patch is, and what
    lies beyond a video's edge is dropped."""
    if patches.device.type != "cpu":
        return scattered(patches, offsets, shapes, layout, patch_size, capacity, order)
    return _put(patches, offsets, shapes, *_of(layout), list(patch_size), capacity, order)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, layout: PackedLayout) -> Tensor:
    """x · weightᵀ + bias of the tokens, zeros for padding, whatever stands there, in the gradients too."""
    if x.device.type == "cpu":
        return _linear(x, weight, bias, layout.cu_seqlens)
    used = (layout.segment_ids >= 0)[:, None]
    return torch.where(used, F.linear(torch.where(used, x, 0), weight, bias), 0)


def gathered(
    flat: Tensor, offsets: Tensor, shapes: Tensor, layout: PackedLayout, patch_size: PatchSize, channels: int
) -> Tensor:
    """`cut` without waiting for the device."""
    index, exists = pixel_index(offsets, shapes, layout, channels, patch_size)
    # What does not exist reads the first element and drops it; an empty buffer gets one.
    flat = flat if flat.shape[0] else F.pad(flat, (0, 1))
    return torch.where(exists, flat[torch.where(exists, index, 0)], 0).flatten(1)


def scattered(
    patches: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    layout: PackedLayout,
    patch_size: PatchSize,
    capacity: int,
    order: str = "thwc",
) -> Tensor:
    """`put` without waiting for the device."""
    channels = patches.shape[1] // math.prod(patch_size)
    index, exists = pixel_index(offsets, shapes, layout, channels, patch_size)
    # One element more than the buffer: where everything goes that is cropped or padding.
    index = torch.where(exists & (index < capacity), index, capacity)
    values = reordered(patches, 1, patch_size, order, "cthw")
    return patches.new_zeros(capacity + 1).scatter(0, index.flatten(), values.flatten())[:capacity]


def _of(layout: PackedLayout) -> tuple[Tensor, Tensor, Tensor, bool]:
    return layout.cu_seqlens, layout.grids, layout.raster_index, layout.is_raster


class _Video(NamedTuple):
    """A segment with tokens. rows: the place of each in its full grid; None: they are that grid, in raster order."""

    tokens: slice
    elements: slice
    shape: list[int]
    grid: list[int]
    rows: Tensor | None


def _videos(
    offsets: Tensor, shapes: Tensor, cu_seqlens: Tensor, grids: Tensor, raster_index: Tensor, is_raster: bool
) -> Iterator[_Video]:
    first, start = cu_seqlens.tolist(), offsets.tolist()
    for segment, (shape, grid) in enumerate(zip(shapes.tolist(), grids.tolist(), strict=True)):
        tokens = slice(*first[segment : segment + 2])
        if tokens.stop == tokens.start:
            continue
        whole = is_raster and tokens.stop - tokens.start == math.prod(grid)
        elements = slice(*start[segment : segment + 2])
        yield _Video(tokens, elements, shape, grid, None if whole else raster_index[tokens].long())


# What a CPU copies at once: pixels side by side in a video that are so in a patch as well. By size in bytes.
_RUNS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _boxes(pixels: Tensor, rows: Tensor, grid: list[int], patch_size: list[int], order: str) -> tuple[Tensor, Tensor]:
    """Views of a video (C, T, H, W) of whole patches and of its rows [T·H·W, K], of one shape: (the t, h, w of a token,
    then its patch)."""
    t, h, w = grid
    pt, ph, pw = patch_size
    run = _RUNS.get(pw * pixels.element_size())
    # Two numbers of 4 bytes as one of 8: 4 to 7× faster, since otherwise the innermost loop is of two.
    aligned = all(x.storage_offset() % pw == 0 for x in (pixels, rows))
    if run is not None and aligned and order[-1] == "w":
        pixels, rows, pw = pixels.view(run), rows.view(run), 1
    patch = [{"c": 0, "t": 2, "h": 4, "w": 6}[axis] for axis in order]
    boxes = pixels.view(-1, t, pt, h, ph, w, pw).permute(1, 3, 5, *patch)
    return boxes, rows.view(boxes.shape)


@op("sora_fast::cut_patches")
def _cut(
    flat: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    cu_seqlens: Tensor,
    grids: Tensor,
    raster_index: Tensor,
    is_raster: bool,
    patch_size: list[int],
    columns: int,
    order: str,
) -> Tensor:
    out = flat.new_empty(raster_index.shape[0], columns)
    out[int(cu_seqlens[-1]) :].zero_()
    for video in _videos(offsets, shapes, cu_seqlens, grids, raster_index, is_raster):
        pixels = flat[video.elements].contiguous().view(video.shape)
        beyond = [size * p - n for size, p, n in zip(video.grid, patch_size, video.shape[1:], strict=True)]
        if any(beyond):
            pixels = F.pad(pixels, (0, beyond[2], 0, beyond[1], 0, beyond[0]))
        own = out[video.tokens]
        full = own if video.rows is None else out.new_empty(math.prod(video.grid), columns)
        boxes, target = _boxes(pixels, full, video.grid, patch_size, order)
        target.copy_(boxes)
        if full is not own:
            torch.index_select(full, 0, video.rows, out=own)
    return out


@op("sora_fast::put_patches")
def _put(
    patches: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    cu_seqlens: Tensor,
    grids: Tensor,
    raster_index: Tensor,
    is_raster: bool,
    patch_size: list[int],
    capacity: int,
    order: str,
) -> Tensor:
    videos = list(_videos(offsets, shapes, cu_seqlens, grids, raster_index, is_raster))
    written = sum(video.elements.stop - video.elements.start for video in videos)
    flat = patches.new_empty(capacity) if written == capacity else patches.new_zeros(capacity)
    for video in videos:
        full = patches[video.tokens]
        if video.rows is not None:
            own, full = full, patches.new_zeros(math.prod(video.grid), patches.shape[1])
            full.index_copy_(0, video.rows, own)
        channels, *sizes = video.shape
        pixels = flat[video.elements].view(video.shape)
        whole = [size * p for size, p in zip(video.grid, patch_size, strict=True)]
        padded = pixels if whole == sizes else flat.new_empty(channels, *whole)
        target, boxes = _boxes(padded, full.contiguous(), video.grid, patch_size, order)
        target.copy_(boxes)
        if padded is not pixels:
            t, h, w = sizes
            pixels.copy_(padded[:, :t, :h, :w])
    return flat


@_cut.register_fake
def _(flat: Tensor, *rest: Any) -> Tensor:
    raster_index, columns = rest[4], rest[7]
    return flat.new_empty(raster_index.shape[0], columns)


@_put.register_fake
def _(patches: Tensor, *rest: Any) -> Tensor:
    return patches.new_empty(rest[7])


def _save_places(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *places, ctx.is_raster, ctx.patch_size, _, ctx.order = inputs
    ctx.save_for_backward(*places)
    ctx.size = x.shape[-1]


def _cut_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_flat = _put(grad, *ctx.saved_tensors, ctx.is_raster, ctx.patch_size, ctx.size, ctx.order)
    return d_flat, *[None] * 9


def _put_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_patches = _cut(grad, *ctx.saved_tensors, ctx.is_raster, ctx.patch_size, ctx.size, ctx.order)
    return d_patches, *[None] * 9


_cut.register_autograd(_cut_backward, setup_context=_save_places)
_put.register_autograd(_put_backward, setup_context=_save_places)


@op("sora_fast::linear_of_tokens")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    used = int(cu_seqlens[-1])
    out = x.new_empty(x.shape[0], weight.shape[0])
    out[used:].zero_()
    if bias is None:
        torch.mm(x[:used], weight.t(), out=out[:used])
    else:
        torch.addmm(bias, x[:used], weight.t(), out=out[:used])
    return out


@op("sora_fast::linear_of_tokens_backward")
def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor, needed: list[bool]) -> list[Tensor]:
    """Of x, weight and bias, those that are needed."""
    used = int(cu_seqlens[-1])
    own, found = grad[:used], []
    if needed[0]:
        d_x = x.new_empty(x.shape)
        d_x[used:].zero_()
        torch.mm(own, weight, out=d_x[:used])
        found.append(d_x)
    if needed[1]:
        # Into a tensor: under autocast a product that makes its own would be rounded to 16 bits.
        found.append(torch.mm(own.t(), x[:used], out=x.new_empty(weight.shape)))
    if needed[2]:
        found.append(own.sum(dim=0))
    return found


@_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor, needed: list[bool]) -> list[Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return [x.new_empty(shape) for shape, asked in zip(shapes, needed, strict=True) if asked]


def _save_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, cu_seqlens)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    found = iter(_linear_backward(grad, *ctx.saved_tensors, needed))
    return *(next(found) if asked else None for asked in needed), None


_linear.register_autograd(_gradients, setup_context=_save_factors)
