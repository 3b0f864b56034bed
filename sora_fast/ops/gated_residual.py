"""gated_residual: a branch, times the row of a gate table that each token points to, added to the residual stream."""

from typing import Any

import torch
from torch import Tensor

from sora_fast.ops._checks import once
from sora_fast.ops._dispatch import choose
from sora_fast.ops._modulation import (
    Index,
    check_modulated,
    csr,
    gather_rows,
    guarded,
    offered,
    parts,
    table_gradients,
    widened,
    without_padding,
)
from sora_fast.ops._op import kernels, op


def gated_residual(
    residual: Tensor, branch: Tensor, gate: Tensor, index: Index, *, backend: str | None = None
) -> Tensor:
    """residual + gate[index] · branch.

    residual, branch: [N, C] of one dtype, bf16, fp16 or fp32 (fp64 on the torch backend), any strides.
    gate: [M, C] in fp32 or in that dtype, any strides.
    index: [N] int32, the row of each token, −1 for padding; or a RowIndex, which saves the backward pass a sort.
        Rows are not checked to be below M.

    Returns [N, C] in the inputs' dtype; products and sums are fp32. Padding gives zeros, in the gradients too,
    whatever stands there. Raises TypeError or ValueError for arguments that do not fit together.
    """
    _check(residual, branch, gate, index)
    if choose("gated_residual", backend, residual.device, offered(residual), residual.dtype) == "torch":
        return plain_gated_residual(residual, branch, gate, index)
    return _gated_residual(residual, branch, gate, *parts(index))


def plain_gated_residual(residual: Tensor, branch: Tensor, gate: Tensor, index: Index) -> Tensor:
    """The torch backend."""
    out = torch.addcmul(widened(residual), gather_rows(gate, index), widened(guarded(branch, index)))
    return without_padding(out, index).to(residual.dtype)


@op("sora_fast::gated_residual")
def _gated_residual(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    index: Tensor,
    offsets: Tensor | None,  # only the backward pass reads these two
    tokens: Tensor | None,
) -> Tensor:
    return kernels("gated_residual").gated_residual_forward(residual, branch, gate, index)


@op("sora_fast::gated_residual_backward")
def _gated_residual_backward(
    d_out: Tensor,
    branch: Tensor,
    gate: Tensor,
    index: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    tables: bool,  # whether anybody asks for the gate's gradient
) -> tuple[Tensor, Tensor, Tensor]:
    from sora_fast.kernels.gated_residual import gated_residual_backward

    return gated_residual_backward(d_out, branch, gate, index, offsets, tokens, tables=tables)


@_gated_residual.register_fake
def _(residual: Tensor, *_: Any) -> Tensor:
    return residual.new_empty(residual.shape)


@_gated_residual_backward.register_fake
def _(d_out: Tensor, branch: Tensor, gate: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return branch.new_empty(branch.shape), branch.new_empty(branch.shape), gate.new_empty(1 * rest[-1], *gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    branch, gate, index, offsets, tokens = ctx.saved_tensors
    offsets, tokens = csr(index, offsets, tokens, gate.shape[0])
    d_residual, d_branch, d_tables = _gated_residual_backward(
        d_out, branch, gate, index, offsets, tokens, ctx.needs_input_grad[2]
    )
    return d_residual, d_branch, *table_gradients(d_tables, 1), None, None, None


_gated_residual.register_autograd(_backward, setup_context=_save)


@once
def _check(residual: Tensor, branch: Tensor, gate: Tensor, index: Index) -> None:
    check_modulated({"residual": residual, "branch": branch}, {"gate": gate}, index)
