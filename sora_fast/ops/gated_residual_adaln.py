"""gated_residual_adaln: the gate of one branch and the norm of the next, in a single pass over memory."""

from typing import Any

import torch
from torch import Tensor

from sora_fast.ops._checks import once
from sora_fast.ops._dispatch import choose
from sora_fast.ops._modulation import (
    Index,
    by_rows,
    check_modulated,
    fake_tables,
    offered_rows,
    parts,
    table_gradients,
    table_kind,
)
from sora_fast.ops._norm import affine_gradients, check_norm, contiguous, fake_affine, fake_stats, sums_asked
from sora_fast.ops._op import kernels, op
from sora_fast.ops.adaln import plain_adaln
from sora_fast.ops.gated_residual import plain_gated_residual


def gated_residual_adaln(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Index,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h = residual + gate[index] · branch, and (norm(h) · weight + bias) · (1 + scale[index]) + shift[index]: both.

    residual, branch: [N, C] of one dtype, bf16, fp16 or fp32 (fp64 on the torch backend), any strides.
    gate, shift, scale: [M, C], all in fp32 or all in that dtype, any strides (chunks of one [M, 6C], say). None is left
        out of the formula and of all that is read and kept, which ones and zeros are not.
    index: [N] int32, the row of each token, −1 for padding; or a RowIndex, which saves the backward pass a sort.
        Rows are not checked to be below M. (Without any table it says only which tokens are padding.)
    norm: "layer" or "rms", LayerNorm or RMSNorm (arXiv:1910.07467) of every row.
    weight, bias: [C] in fp32 or in that dtype, each on its own; None costs nothing.

    Not fused here: a norm of the branch (Mochi), and two modulations of h (SD3.5). They are `gated_residual` with its
    branch_norm, then `adaln`, or `gated_residual`, then `adaln_pair`: both read h once more, 2C bytes a token in bf16.

    Returns two [N, C] in the inputs' dtype; sums and statistics are fp32, and h is rounded before its norm is taken.
    Padding gives zeros, in the gradients too, whatever stands there. Raises TypeError or ValueError for arguments that
    do not fit together.

    Kept for the backward pass, on Triton: h, the branch, and fp32 statistics, so 4C + 8 bytes a token in bf16 (RMSNorm
    4C + 4); the formula written out keeps 10C + 4. What is normed is made again from h. At C = 1152: 4,616 and 11,524.
    Without a gate it is 2C + 8, since nothing asks for the branch. There is no less to keep here: h is also the
    residual of the next op, which lives as long. The result of the norm, another 2C, is kept by the Linear behind it,
    for its weight; see `DiTBlock`'s norm_recompute.
    """
    _check(residual, branch, gate, shift, scale, index, norm, weight, bias, eps)
    if choose("gated_residual_adaln", backend, residual.device, offered_rows(residual), residual.dtype) == "torch":
        h = plain_gated_residual(residual, branch, gate, index)
        return h, plain_adaln(h, shift, scale, index, norm, weight, bias, eps)
    affine = contiguous(weight), contiguous(bias)
    return _gated_residual_adaln(residual, branch, gate, shift, scale, *affine, *parts(index), norm, eps)[:2]


@op("sora_fast::gated_residual_adaln")
def _gated_residual_adaln(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
    offsets: Tensor | None,  # only the backward pass reads these two
    tokens: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    forward = kernels("gated_residual_adaln").gated_residual_adaln_forward
    return forward(residual, branch, gate, shift, scale, weight, bias, index, eps=eps, centred=norm == "layer")


@op("sora_fast::gated_residual_adaln_backward")
def _gated_residual_adaln_backward(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    index: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    norm: str,
    d_gate: bool,  # whether anybody asks for it
    d_shift: bool,
    d_scale: bool,
    dtype: torch.dtype,  # of these three
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sora_fast.kernels.gated_residual_adaln import gated_residual_adaln_backward

    tensors = (dh, dy, h, branch, gate, scale, weight, bias, stats, index, offsets, tokens)
    options = {"centred": norm == "layer", "asked": (d_gate, d_shift, d_scale), "dtype": dtype}
    d_residual, d_branch, *others = gated_residual_adaln_backward(*tensors, **options)
    return d_residual, h.new_empty(0) if d_branch is None else d_branch, *others


@_gated_residual_adaln.register_fake
def _(residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, norm, _ = rest
    h, y = (residual.new_empty(residual.shape) for _ in range(2))
    return h, y, fake_stats(residual, norm)


@_gated_residual_adaln_backward.register_fake
def _(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, offsets, *_, d_gate, d_shift, d_scale, dtype = rest
    tables = fake_tables(h, (d_gate, d_shift, d_scale), offsets, dtype)
    d_branch = h.new_empty(0 if gate is None else h.shape)
    return h.new_empty(h.shape), d_branch, tables, fake_affine(h, weight, bias, d_scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, shift, scale, weight, bias, *rows, norm, _ = inputs
    h, _, stats = output
    ctx.save_for_backward(h, None if gate is None else branch, gate, scale, weight, bias, stats, *rows)
    ctx.norm, ctx.tables = norm, table_kind(gate, shift, scale)
    ctx.given = tuple(table is not None for table in (gate, shift, scale))
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dh: Tensor | None, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    h, branch, gate, scale, weight, bias, stats, *rows = ctx.saved_tensors
    dy = torch.zeros_like(h) if dy is None else dy
    num_rows, dtype = ctx.tables
    _, _, gate_needed, shift_needed, scale_needed, *affine_needed = ctx.needs_input_grad[:7]
    asked = gate_needed, *sums_asked(shift_needed, scale_needed, any(affine_needed), weight, bias)
    saved = h, branch, gate, scale, weight, bias, stats, *by_rows(*rows, num_rows)
    d_residual, d_branch, d_tables, d_affine = _gated_residual_adaln_backward(dh, dy, *saved, ctx.norm, *asked, dtype)
    d_branch = d_residual if gate is None else d_branch
    tables = table_gradients(d_tables, asked, ctx.given)
    return d_residual, d_branch, *tables, *affine_gradients(d_affine, weight, bias), *(None,) * 5


_gated_residual_adaln.register_autograd(_backward, setup_context=_save)


@once
def _check(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Index,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    tables = {"gate": gate, "shift": shift, "scale": scale}
    check_modulated({"residual": residual, "branch": branch}, tables, index)
    check_norm("residual", residual, norm, weight, bias, eps)
