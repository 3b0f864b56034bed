"""adaln: LayerNorm without affine, scaled and shifted by the row of a modulation table that each token points to."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.ops._checks import check_eps
from sora_fast.ops._dispatch import choose
from sora_fast.ops._modulation import (
    Index,
    check_modulated,
    csr,
    gather_rows,
    offered_rows,
    parts,
    table_gradients,
    without_padding,
)


def adaln(
    x: Tensor, shift: Tensor, scale: Tensor, index: Index, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """LayerNorm(x) · (1 + scale[index]) + shift[index] (adaLN of DiT, arXiv:2212.09748).

    x: [N, C], bf16, fp16 or fp32 (fp64 on the torch backend), any strides.
    shift, scale: [M, C] in fp32 or in x's dtype, any strides (chunks of one [M, 6C], say).
    index: [N] int32, the row of each token, −1 for padding; or a RowIndex, which saves the backward pass a sort.
        Rows are not checked to be below M.

    Returns [N, C] in x's dtype; statistics are fp32. Padding gives zeros, in the gradients too, whatever stands there.
    Raises TypeError or ValueError for arguments that do not fit together.
    """
    check_modulated({"x": x}, {"shift": shift, "scale": scale}, index)
    check_eps(eps)
    if choose("adaln", backend, x.device, offered_rows(x)) == "torch":
        return plain_adaln(x, shift, scale, index, eps)
    return _adaln(x, shift, scale, *parts(index), eps)[0]


def plain_adaln(x: Tensor, shift: Tensor, scale: Tensor, index: Index, eps: float) -> Tensor:
    """The torch backend. Padding is zero in every factor, so that no NaN in it reaches a gradient."""
    normed = F.layer_norm(without_padding(x, index), x.shape[1:], eps=eps)
    return (normed * (1 + gather_rows(scale, index)) + gather_rows(shift, index)).to(x.dtype)


@torch.library.custom_op("sora_fast::adaln", mutates_args=())
def _adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor,
    offsets: Tensor | None,  # only the backward pass reads these two
    tokens: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from sora_fast.kernels.adaln import adaln_forward

    return adaln_forward(x, shift, scale, index, eps)


@torch.library.custom_op("sora_fast::adaln_backward", mutates_args=())
def _adaln_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    stats: Tensor,
    index: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    tables: bool,  # whether anybody asks for the tables' gradients
) -> tuple[Tensor, Tensor]:
    from sora_fast.kernels.adaln import adaln_backward

    return adaln_backward(dy, x, scale, stats, index, offsets, tokens, tables=tables)


@_adaln.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(2, x.shape[0], dtype=torch.float32)


@_adaln_backward.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(2 * rest[-1], *scale.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, scale, *rows, _ = inputs
    _, stats = output
    ctx.save_for_backward(x, scale, stats, *rows)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, scale, stats, index, offsets, tokens = ctx.saved_tensors
    offsets, tokens = csr(index, offsets, tokens, scale.shape[0])
    dx, d_tables = _adaln_backward(dy, x, scale, stats, index, offsets, tokens, any(ctx.needs_input_grad[1:3]))
    return dx, *table_gradients(d_tables, 2), None, None, None, None


_adaln.register_autograd(_backward, setup_context=_save)
