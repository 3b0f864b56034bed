"""Where the pixels of a patch lie in the flat buffer of ragged latents."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sora_fast.ops._checks import KERNEL_DTYPES, check_device, check_dtype, check_layout, check_shape, may_read, once
from sora_fast.packing import PackedLayout

PatchSize = tuple[int, int, int]

# How the numbers of a patch may stand in its row, the last letter's neighbours side by side: a Conv3d kernel's way,
# DiT's, and that of Cosmos' last layer.
ORDERS = ("cthw", "thwc", "hwtc")


def pixel_index(
    offsets: Tensor, shapes: Tensor, layout: PackedLayout, channels: int, patch_size: PatchSize
) -> tuple[Tensor, Tensor]:
    """The element of `flat` that every pixel of every token is.

    offsets [S+1], shapes [S, 4]: as in RaggedLatents. Returns the elements [N, channels, pt, ph, pw] int64 and which
    of them exist [N, 1, pt, ph, pw] bool: not those beyond a video's edge, and none of a padding token.
    """
    segments = layout.segment_ids.clamp(min=0)
    frames, height, width = (size.view(-1, 1, 1, 1, 1) for size in shapes[segments, 1:].long().unbind(1))
    t, h, w = (
        (layout.coords[:, axis, None].long() * size + torch.arange(size, device=layout.device)).view(
            -1, 1, *(size if a == axis else 1 for a in range(3))
        )
        for axis, size in enumerate(patch_size)
    )
    c = torch.arange(channels, device=layout.device).view(1, -1, 1, 1, 1)
    index = (offsets[segments].view(-1, 1, 1, 1, 1) + (c * frames + t) * height * width) + h * width + w
    used = (layout.segment_ids >= 0).view(-1, 1, 1, 1, 1)
    return index, used & (t < frames) & (h < height) & (w < width)


def geometry(
    offsets: Tensor, shapes: Tensor, layout: PackedLayout, patch_size: PatchSize
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """What the custom ops take of them. The kernels read these at stride 1: nothing is copied where they are so."""
    segment_ids, coords = layout.segment_ids.contiguous(), layout.coords.contiguous()
    return offsets.contiguous(), shapes.contiguous(), segment_ids, coords, list(patch_size)


def offered_patches(x: Tensor) -> tuple[str, ...]:
    """The backends that move patches of the dtype of `x`: all but Triton move any."""
    return ("torch", "cpu", "cuda", "triton") if x.dtype in KERNEL_DTYPES else ("torch", "cpu", "cuda")


def check_patch_size(patch_size: PatchSize) -> None:
    """Raise ValueError unless it is three sizes ≥ 1."""
    is_three = isinstance(patch_size, Sequence) and len(patch_size) == 3
    if not is_three or not all(isinstance(size, int) and size >= 1 for size in patch_size):
        raise ValueError(f"patch_size: {patch_size!r}; it must be three ints (pt, ph, pw) ≥ 1")


def check_order(order: str) -> None:
    """ValueError unless it is one."""
    if order not in ORDERS:
        raise ValueError(f"order: {order!r}; it must be one of {ORDERS}")


def reordered(x: Tensor, dim: int, patch_size: PatchSize, order: str, wanted: str) -> Tensor:
    """`x` with the numbers of a patch, which its dimension `dim` counts in `order`, in another: itself, or a copy."""
    if order == wanted:
        return x
    sizes = dict(zip("thw", patch_size, strict=True))
    sizes["c"] = x.shape[dim] // math.prod(patch_size)
    axes = [dim + order.index(axis) for axis in wanted]
    parts = x.unflatten(dim, [sizes[axis] for axis in order])
    return parts.permute(*range(dim), *axes, *range(dim + 4, parts.ndim)).flatten(dim, dim + 3)


def check_grids(shapes: Tensor, layout: PackedLayout, patch_size: PatchSize) -> None:
    """Raise ValueError or TypeError unless each is one, and the layout's grids are the videos' sizes divided by the
    patch, rounded up.

    The values are only looked at where `may_read` allows it.
    """
    _check_each(shapes, layout, patch_size)
    if not may_read(shapes):
        return
    # By numpy: a few numbers, for which PyTorch takes several times as long.
    wrong = (-(-shapes[:, 1:].numpy() // np.asarray(patch_size)) != layout.grids.numpy()).any(axis=1)
    if wrong.any():
        place = int(wrong.argmax())
        raise ValueError(
            f"layout: segment {place} has the grid {tuple(layout.grids[place].tolist())}, but its video "
            f"(C, T, H, W) = {tuple(shapes[place].tolist())} in patches of {tuple(patch_size)} has another"
        )


@once
def _check_each(shapes: Tensor, layout: PackedLayout, patch_size: PatchSize) -> None:
    check_patch_size(patch_size)
    check_layout(layout)
    if layout.is_joint:
        raise ValueError("layout: a joint one, whose texts have no patches; it must be the videos' own")
    check_shape("shapes", shapes, [layout.max_segments, 4])
    check_dtype("shapes", shapes, [torch.int32, torch.int64])
    check_device("shapes", shapes, "the layout", layout.device)
