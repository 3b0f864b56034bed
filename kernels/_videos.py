"""Where videos of ragged sizes lie in a flat buffer that is about to be made: in one launch what takes PyTorch nine."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._launch import launch

# Videos that are looked at in one go; one program does all.
_BLOCK = 128


def videos(shapes: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Offsets [S+1] int64 and shapes [S, 4] of `RaggedLatents` of so many channels, of the sizes in `shapes` [S, 4].

    A place without pixels gets no channels. shapes: int32 or int64, of any strides; the result's are contiguous.
    """
    count = shapes.shape[0]
    offsets = shapes.new_empty(count + 1, dtype=torch.int64)
    table = shapes.new_empty(count, 4)
    launch(videos_kernel, (1,), shapes, *shapes.stride(), offsets, table, channels, count, BLOCK=_BLOCK, num_warps=4)
    return offsets, table


@triton.jit
def videos_kernel(shapes, stride_video, stride_axis, offsets, table, channels, count, BLOCK: tl.constexpr):
    total = tl.full([], 0, tl.int64)
    for first in range(0, count, BLOCK):
        video = (first + tl.arange(0, BLOCK)).to(tl.int64)
        exists = video < count
        sizes = shapes + video * stride_video
        frames = tl.load(sizes + stride_axis, mask=exists, other=0)
        height = tl.load(sizes + 2 * stride_axis, mask=exists, other=0)
        width = tl.load(sizes + 3 * stride_axis, mask=exists, other=0)
        elements = frames.to(tl.int64) * height * width * channels
        tl.store(offsets + video, total + tl.cumsum(elements, 0) - elements, mask=exists)
        row = table + video * 4
        tl.store(row, tl.where(elements > 0, channels, 0).to(table.dtype.element_ty), mask=exists)
        tl.store(row + 1, frames, mask=exists)
        tl.store(row + 2, height, mask=exists)
        tl.store(row + 3, width, mask=exists)
        total += tl.sum(elements, 0)
    tl.store(offsets + count, total)
