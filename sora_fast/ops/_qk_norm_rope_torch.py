"""qk_norm_rope in plain PyTorch, with a backward pass written by hand."""

from typing import Any

import torch
from torch import Tensor

from sora_fast.ops._modulation import widened


class NormRope(torch.autograd.Function):
    """For x [N, H, D]. cos, sin: [N, 1 or H, D/2]; None: no rotation. weight, bias, norm: as `qk_norm_rope` takes them.

    Padding is taken out of what is written, and of the sums: a mask on what is read kept Inductor from vectorising,
    which took 3 to 6× as long on a CPU. Its own derivative of this backward pass is up to 1.8× slower.
    Only arguments are saved: what is made of them would be a constant to the derivative of the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        segment_ids: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        interleaved: bool,
        norm: str,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, segment_ids, cos, sin)
        ctx.interleaved, ctx.norm, ctx.eps = interleaved, norm, eps
        y = widened(x)
        if weight is not None:
            y = _affine(_normed(y, norm, eps)[0], weight, bias)
        return _turned(y, cos, sin, interleaved, (segment_ids >= 0)[:, None, None]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, segment_ids, cos, sin = ctx.saved_tensors
        used = segment_ids >= 0
        grad, d_weight, d_bias, d_turn = widened(grad), None, None, (None, None)
        g = _turned(grad, cos, None if sin is None else -sin, ctx.interleaved)
        if weight is not None:
            normed, rstd = _normed(widened(x), ctx.norm, ctx.eps)
        if any(ctx.needs_input_grad[4:6]):
            y = widened(x) if weight is None else _affine(normed, weight, bias)
            d_turn = _turn_gradients(grad, y, cos, used, ctx.interleaved)
        if weight is not None:
            d_weight = _sum_tokens(g * normed, used, weight)
            d_bias = None if bias is None else _sum_tokens(g, used, bias)
            g = g * _over_heads(weight, g)
            less = normed * _mean(g * normed, ctx.norm)
            g = rstd * (g - less if ctx.norm != "layer" else g - _mean(g, ctx.norm) - less)
        return torch.where(used[:, None, None], g, 0).to(x.dtype), d_weight, d_bias, None, *d_turn, *[None] * 3


def _mean(x: Tensor, norm: str) -> Tensor:
    """Over the channels that are normed together."""
    return x.mean(dim=(-2, -1) if norm == "rms_across_heads" else -1, keepdim=True)


def _normed(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """And the factor that made it so."""
    centred = x - _mean(x, norm) if norm == "layer" else x
    rstd = torch.rsqrt(_mean(centred.square(), norm) + eps)
    return centred * rstd, rstd


def _over_heads(vector: Tensor, x: Tensor) -> Tensor:
    """A weight or a bias, [D] or [H·D], as it meets x [N, H, D]."""
    vector = widened(vector)
    return vector if vector.shape[0] == x.shape[2] else vector.unflatten(0, x.shape[1:])


def _affine(normed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = normed * _over_heads(weight, normed)
    return y if bias is None else y + _over_heads(bias, normed)


def _sum_tokens(x: Tensor, used: Tensor, like: Tensor) -> Tensor:
    """Over the tokens of x [N, H, D], and the heads that share the vector `like`.

    In fp64: Inductor adds token after token, and in fp32 would lose a digit over 8,000 of them.
    """
    own = x.sum(dim=1) if like.shape[0] == x.shape[2] else x.flatten(1)
    return torch.where(used[:, None], own, 0).sum(dim=0, dtype=torch.float64).to(like.dtype)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)


def _turned(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, used: Tensor | None = None) -> Tensor:
    """x [N, H, D] rotated; zeros where not `used`."""
    if cos is None:
        return x if used is None else torch.where(used, x, 0)
    a, b = _pairs(x, interleaved)
    turned = (a * cos - b * sin, a * sin + b * cos)
    if used is not None:
        turned = tuple(torch.where(used, half, 0) for half in turned)
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


def _turn_gradients(grad: Tensor, y: Tensor, cos: Tensor, used: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Of the cosine and the sine that have turned y, summed over the heads if they share them."""
    (da, db), (a, b) = _pairs(grad, interleaved), _pairs(y, interleaved)
    both = da * a + db * b, db * a - da * b
    if cos.shape[1] != y.shape[1]:
        both = tuple(x.sum(dim=1, keepdim=True) for x in both)
    return tuple(torch.where(used[:, None, None], x, 0).to(cos.dtype) for x in both)
