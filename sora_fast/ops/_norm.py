"""What the ops that norm tokens share: checks, the norm in plain PyTorch, and the gradients of its weight and bias."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.ops._checks import check_device, check_dtype, check_eps, check_shape

NORMS = ("layer", "rms")


def check_norm(
    first: str, x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float, *, prefix: str = ""
) -> None:
    """A norm of the rows of `x` [N, C], the argument named `first`. prefix: of the names of the norm's own arguments.
    ValueError, TypeError."""
    if norm not in NORMS:
        raise ValueError(f'{prefix}norm: {norm!r}; it must be "layer" or "rms"')
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_shape(prefix + name, vector, x.shape[1:])
            check_dtype(prefix + name, vector, [x.dtype, torch.float32])
            check_device(prefix + name, vector, first, x.device)
    check_eps(eps)


def contiguous(vector: Tensor | None) -> Tensor | None:
    """As the kernels read it; nothing is copied where it is so."""
    return None if vector is None else vector.contiguous()


def plain_norm(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """norm(x) · weight + bias, in the dtype of x."""
    weight, bias = (None if vector is None else vector.to(x.dtype) for vector in (weight, bias))
    if norm == "layer":
        return F.layer_norm(x, x.shape[1:], weight, bias, eps)
    normed = F.rms_norm(x, x.shape[1:], weight, eps)
    return normed if bias is None else normed + bias


def affine_gradients(grads: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """[2, C] fp32 as the gradients of the weight and the bias; None for one that is not there, or for both, [0, C]."""
    if not len(grads):
        return None, None
    pairs = zip(grads.unbind(), (weight, bias), strict=True)
    return tuple(None if vector is None else grad.to(vector.dtype) for grad, vector in pairs)


def fake_stats(x: Tensor, norm: str) -> Tensor:
    """What the kernels save of a norm of `x` [N, C]: 1/std of every row, and its mean for LayerNorm."""
    return x.new_empty(2 if norm == "layer" else 1, x.shape[0], dtype=torch.float32)


def sums_asked(shift: bool, scale: bool, affine: bool, weight: Tensor | None, bias: Tensor | None) -> tuple[bool, bool]:
    """Which of the sums over a row's tokens are made, Σ dy and Σ dy · normed, from whether anybody asks for the
    gradients of the shift, the scale, and the weight or the bias: with either of these, both or none."""
    if weight is None and bias is None:
        return shift, scale
    return (shift or scale or affine,) * 2


def fake_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, sums: bool) -> Tensor:
    """What `affine_gradients` takes, of a norm of `x` [N, C]. sums: whether anybody asks for it, or for the tables'
    gradients."""
    given = sums and not (weight is None and bias is None)
    return x.new_empty(2 * given, x.shape[1], dtype=torch.float32)
