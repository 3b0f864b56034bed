"""Normed tokens that the layer behind them need not keep: they are made again from what is kept anyway."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_fast.nn.patch import autocast
from sora_fast.ops._modulation import parts
from sora_fast.ops.adaln import adaln, backend_for
from sora_fast.packing import RowIndex


class Normed(NamedTuple):
    """h [N, C], which is adaln(x, shift, scale, rows, eps=eps), and what it was made of."""

    h: Tensor
    x: Tensor
    shift: Tensor
    scale: Tensor
    rows: RowIndex
    eps: float = 1e-6


def linear(module: nn.Module, h: Tensor | Normed) -> Tensor:
    """module(h). For its weight's gradient a plain nn.Linear keeps what a `Normed` was made of, in place of h."""
    if isinstance(h, Normed) and is_plain(module):
        return product(h, module.weight, module.bias)
    return module(h.h if isinstance(h, Normed) else h)


def product(h: Tensor | Normed, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, of which `linear` is made."""
    if isinstance(h, Tensor):
        return F.linear(h, weight, bias)
    # Chosen now: a backward pass, which may run in a thread of its own, knows nothing of `use_backend`.
    made_of = h.x, h.shift, h.scale, *parts(h.rows)
    return _Product.apply(*autocast(h.h, weight, bias), backend_for(h.x), h.eps, *made_of)


def is_plain(module: nn.Module) -> bool:
    """Whether it is an nn.Linear and nothing more: what replaces one or hooks into it (adapters, quantisation, tensor
    parallelism) must be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    # Offloading (accelerate) sets another `forward` on the module itself.
    return type(module) is nn.Linear and "forward" not in module.__dict__ and not any(hooks)


class _Product(torch.autograd.Function):
    """The tokens' gradient goes into h, as if nothing were known of where it comes from."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        backend: str,
        eps: float,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        *rows: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight, x, shift, scale, *rows)
        ctx.backend, ctx.eps = backend, eps
        return F.linear(h, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, shift, scale, *rows = ctx.saved_tensors
        d_h = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_h = grad @ weight
        if ctx.needs_input_grad[1]:
            h = adaln(x, shift, scale, RowIndex(*rows), eps=ctx.eps, backend=ctx.backend)
            d_weight = grad.T @ h.to(grad.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = grad.sum(dim=0)
        return d_h, d_weight, d_bias, *[None] * 8
