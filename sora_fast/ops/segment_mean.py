"""segment_mean: the mean token of every segment (the masked pooling of NaViT, arXiv:2307.06304)."""

import torch
from torch import Tensor

from sora_fast.ops._checks import FLOAT_DTYPES, check_device, check_dtype, check_layout, check_shape
from sora_fast.ops._dispatch import choose
from sora_fast.ops._modulation import sum_rows, widened
from sora_fast.packing import PackedLayout


# No custom op: those hold the kernels that autograd and torch.compile cannot look into, and there is none here. Like
# every torch backend this is plain PyTorch, which both of them follow.
def segment_mean(x: Tensor, layout: PackedLayout, *, backend: str | None = None) -> Tensor:
    """Mean over the tokens of every segment.

    x: [N, C] bf16, fp16, fp32 or fp64; padding rows are not read.
    Returns [S, C] in the dtype of x, summed in at least fp32, the same bits on every run. Empty segments give zeros.
    """
    check_layout(layout)
    check_shape("x", x, [layout.capacity, "C"])
    if x.shape[1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)}; it must have at least one column")
    check_dtype("x", x, FLOAT_DTYPES)
    check_device("x", x, "the layout", layout.device)
    choose("segment_mean", backend, x.device, ("torch",))
    tokens = torch.arange(layout.capacity, dtype=torch.int32, device=x.device)
    sums = sum_rows(widened(x), layout.segment_ids, layout.cu_seqlens, tokens)
    lengths = layout.cu_seqlens.diff().clamp(min=1)
    return (sums / lengths[:, None]).to(x.dtype)
