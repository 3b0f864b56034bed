"""segment_mean: the mean token of every segment (the masked pooling of NaViT, arXiv:2307.06304)."""

import torch
from torch import Tensor

from sora_fast.ops._checks import FLOAT_DTYPES, check_device, check_dtype, check_shape
from sora_fast.ops._dispatch import choose
from sora_fast.packing import PackedLayout


# No custom op: those hold the kernels that autograd and torch.compile cannot look into, and there is none here. Like
# every torch backend this is plain PyTorch, which both of them follow.
def segment_mean(x: Tensor, layout: PackedLayout, *, backend: str | None = None) -> Tensor:
    """Mean over the tokens of every segment.

    x: [N, C] bf16, fp16, fp32 or fp64; padding rows are not read.
    Returns [S, C] in the dtype of x, summed in at least fp32, the same bits on every run. Empty segments give zeros.
    """
    check_shape("x", x, [layout.capacity, "C"])
    check_dtype("x", x, FLOAT_DTYPES)
    check_device("x", x, "the layout", layout.device)
    choose("segment_mean", backend, x.device, ("torch",))
    end = layout.cu_seqlens.new_full((1,), layout.capacity)
    # Padding is one more segment: what stands in it, NaN too, reaches no other one.
    offsets = torch.cat([layout.cu_seqlens, end]).long()
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # unsafe: a check of the offsets would wait for the device.
    means = torch.segment_reduce(wide, "mean", offsets=offsets, axis=0, unsafe=True, initial=0)
    return means[:-1].to(x.dtype)
