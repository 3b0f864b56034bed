"""gated_residual with a norm of the branch: the op behind `gated_residual`'s branch_norm."""

from typing import Any

import torch
from torch import Tensor

from sora_fast.ops._modulation import by_rows, fake_tables, table_kind
from sora_fast.ops._norm import fake_stats
from sora_fast.ops._op import kernels, op


@op("sora_fast::gated_norm")
def gated_norm(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    index: Tensor,
    offsets: Tensor | None,  # only the backward pass reads these two
    tokens: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the statistics of the norm."""
    forward = kernels("gated_residual").gated_norm_forward
    return forward(residual, branch, gate, weight, index, eps=eps, centred=norm == "layer")


@op("sora_fast::gated_norm_backward")
def gated_norm_backward(
    d_out: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    index: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    norm: str,
    sums: bool,  # whether anybody asks for more than d_residual and d_branch
    dtype: torch.dtype,  # of the sums
) -> tuple[Tensor, Tensor, Tensor]:
    """d_residual, d_branch, and Σ d_out · normed over the tokens of every row."""
    tensors = d_out, branch, gate, weight, stats, index, offsets, tokens
    options = {"centred": norm == "layer", "sums": sums, "dtype": dtype}
    return kernels("gated_residual").gated_norm_backward(*tensors, **options)


@gated_norm.register_fake
def _(residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, norm, _ = rest
    return residual.new_empty(residual.shape), fake_stats(residual, norm)


@gated_norm_backward.register_fake
def _(d_out: Tensor, branch: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, offsets, _, _, sums, dtype = rest
    d_residual, d_branch = (branch.new_empty(branch.shape) for _ in range(2))
    return d_residual, d_branch, fake_tables(branch, (sums,), offsets, dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, branch, gate, weight, *rows, ctx.norm, _ = inputs
    _, stats = output
    ctx.save_for_backward(branch, gate, weight, stats, *rows)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    branch, gate, weight, stats, *rows = ctx.saved_tensors
    num_rows, dtype = table_kind(gate)
    rows = by_rows(*rows, num_rows)
    sums = any(ctx.needs_input_grad[2:4])
    dtype = dtype if weight is None else torch.float32
    tensors = d_out, branch, gate, weight, stats, *rows
    d_residual, d_branch, totals = gated_norm_backward(*tensors, ctx.norm, sums, dtype)
    factors = _factor_gradients(totals[0], gate, weight, rows[1]) if sums else (None, None)
    return d_residual, d_branch, *factors, *(None,) * 5


gated_norm.register_autograd(_backward, setup_context=_save)


def _factor_gradients(
    totals: Tensor, gate: Tensor | None, weight: Tensor | None, offsets: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the gate and the weight, of which the totals [M, C] know neither: M rows, in plain PyTorch."""
    if weight is None:
        return totals, None
    if gate is None:
        return None, totals.sum(dim=0).to(weight.dtype)
    used = (offsets[1:] > offsets[:-1])[:, None]  # a row without a token may hold anything
    d_weight = torch.where(used, gate * totals, 0).sum(dim=0)
    return (totals * weight).to(gate.dtype), d_weight.to(weight.dtype)
