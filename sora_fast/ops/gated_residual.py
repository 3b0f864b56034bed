"""gated_residual: a branch, times the row of a gate table that each token points to, added to the residual stream."""

from typing import Any

import torch
from torch import Tensor

from sora_fast.ops._checks import once
from sora_fast.ops._dispatch import choose
from sora_fast.ops._gated_norm import gated_norm
from sora_fast.ops._modulation import (
    Index,
    check_modulated,
    csr,
    gather_rows,
    guarded,
    offered,
    offered_rows,
    parts,
    widened,
    without_padding,
)
from sora_fast.ops._norm import check_norm, contiguous, plain_norm
from sora_fast.ops._op import kernels, op


def gated_residual(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    index: Index,
    *,
    branch_norm: str | None = None,
    branch_weight: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """residual + gate[index] · branch, or with a norm residual + gate[index] · (norm(branch) · branch_weight).

    residual, branch: [N, C] of one dtype, bf16, fp16 or fp32 (fp64 on the torch backend), any strides.
    gate: [M, C] in fp32 or in that dtype, any strides. None is left out: nothing is kept for the backward pass, where a
        gate or a norm keeps the branch. What makes gates of a table, as Mochi's tanh, is the caller's: it runs on M
        rows, and here it would on N tokens.
    index: [N] int32, the row of each token, −1 for padding; or a RowIndex, which saves the backward pass a sort.
        Rows are not checked to be below M. (Without a gate it says only which tokens are padding.)
    branch_norm: None, "rms" (Mochi, Lumina 2) or "layer", of every row of the branch; eps: its. branch_weight: [C] in
        fp32 or in the branch's dtype, or None.

    Returns [N, C] in the inputs' dtype; products, sums and statistics are fp32. Padding gives zeros, in the gradients
    too, whatever stands there. Raises TypeError or ValueError for arguments that do not fit together.
    """
    _check(residual, branch, gate, index, branch_norm, branch_weight, eps)
    offers = offered(residual) if branch_norm is None else offered_rows(residual)
    if choose("gated_residual", backend, residual.device, offers, residual.dtype) == "torch":
        return plain_gated_residual(residual, branch, gate, index, branch_norm, branch_weight, eps)
    if branch_norm is None:
        return _gated_residual(residual, branch, gate, *parts(index))
    return gated_norm(residual, branch, gate, contiguous(branch_weight), *parts(index), branch_norm, eps)[0]


def plain_gated_residual(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    index: Index,
    norm: str | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The torch backend."""
    if norm is not None:
        # The weight is no token's own: only zeros keep what padding holds from its gradient.
        x = guarded(branch, index) if weight is None else without_padding(branch, index)
        branch = plain_norm(widened(x), norm, weight, None, eps)
    if gate is None:
        out = widened(residual) + widened(branch)
    else:
        out = torch.addcmul(widened(residual), gather_rows(gate, index), widened(guarded(branch, index)))
    return without_padding(out, index).to(residual.dtype)


@op("sora_fast::gated_residual")
def _gated_residual(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
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
    _, branch, gate, *rows = inputs
    ctx.save_for_backward(*(rows[:1] if gate is None else (branch, gate, *rows)))


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    if len(ctx.saved_tensors) == 1:  # without a gate both gradients are one
        d_sum = without_padding(d_out, *ctx.saved_tensors)
        return d_sum, d_sum, *(None,) * 4
    branch, gate, index, offsets, tokens = ctx.saved_tensors
    offsets, tokens = csr(index, offsets, tokens, gate.shape[0])
    d_residual, d_branch, d_tables = _gated_residual_backward(
        d_out, branch, gate, index, offsets, tokens, ctx.needs_input_grad[2]
    )
    return d_residual, d_branch, d_tables[0] if len(d_tables) else None, None, None, None


_gated_residual.register_autograd(_backward, setup_context=_save)


@once
def _check(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    index: Index,
    norm: str | None,
    weight: Tensor | None,
    eps: float,
) -> None:
    check_modulated({"residual": residual, "branch": branch}, {"gate": gate}, index)
    if norm is not None:
        check_norm("residual", residual, norm, weight, None, eps, prefix="branch_")
    elif weight is not None:
        raise ValueError("branch_weight: given, but branch_norm is None; name a norm")
