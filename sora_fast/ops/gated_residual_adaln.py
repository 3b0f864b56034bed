"""gated_residual_adaln: the gate of one branch and the norm of the next, in a single pass over memory."""

from typing import Any

import torch
from torch import Tensor

from sora_fast.ops._checks import check_eps
from sora_fast.ops._dispatch import choose
from sora_fast.ops._modulation import Index, check_modulated, csr, offered_rows, parts, table_gradients
from sora_fast.ops.adaln import plain_adaln
from sora_fast.ops.gated_residual import plain_gated_residual


def gated_residual_adaln(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Index,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h = residual + gate[index] · branch, and LayerNorm(h) · (1 + scale[index]) + shift[index]: both.

    residual, branch: [N, C] of one dtype, bf16, fp16 or fp32 (fp64 on the torch backend), any strides.
    gate, shift, scale: [M, C], all in fp32 or all in that dtype, any strides (chunks of one [M, 6C], say).
    index: [N] int32, the row of each token, −1 for padding; or a RowIndex, which saves the backward pass a sort.
        Rows are not checked to be below M.

    Returns two [N, C] in the inputs' dtype; sums and statistics are fp32, and h is rounded before its norm is taken.
    Padding gives zeros, in the gradients too, whatever stands there. Raises TypeError or ValueError for arguments that
    do not fit together.
    """
    tables = {"gate": gate, "shift": shift, "scale": scale}
    check_modulated({"residual": residual, "branch": branch}, tables, index)
    check_eps(eps)
    if choose("gated_residual_adaln", backend, residual.device, offered_rows(residual)) == "torch":
        h = plain_gated_residual(residual, branch, gate, index)
        return h, plain_adaln(h, shift, scale, index, eps)
    return _gated_residual_adaln(residual, branch, gate, shift, scale, *parts(index), eps)[:2]


@torch.library.custom_op("sora_fast::gated_residual_adaln", mutates_args=())
def _gated_residual_adaln(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor,
    offsets: Tensor | None,  # only the backward pass reads these two
    tokens: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from sora_fast.kernels.gated_residual_adaln import gated_residual_adaln_forward

    return gated_residual_adaln_forward(residual, branch, gate, shift, scale, index, eps)


@torch.library.custom_op("sora_fast::gated_residual_adaln_backward", mutates_args=())
def _gated_residual_adaln_backward(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    stats: Tensor,
    index: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    tables: bool,  # whether anybody asks for the tables' gradients
) -> tuple[Tensor, Tensor, Tensor]:
    from sora_fast.kernels.gated_residual_adaln import gated_residual_adaln_backward

    rows = (index, offsets, tokens)
    return gated_residual_adaln_backward(dh, dy, h, branch, gate, scale, stats, *rows, tables=tables)


@_gated_residual_adaln.register_fake
def _(residual: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    h, y = (residual.new_empty(residual.shape) for _ in range(2))
    return h, y, residual.new_empty(2, residual.shape[0], dtype=torch.float32)


@_gated_residual_adaln_backward.register_fake
def _(
    dh: Tensor | None, dy: Tensor, h: Tensor, branch: Tensor, gate: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), branch.new_empty(branch.shape), gate.new_empty(3 * rest[-1], *gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, _, scale, *rows, _ = inputs
    h, _, stats = output
    ctx.save_for_backward(h, branch, gate, scale, stats, *rows)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dh: Tensor | None, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    h, branch, gate, scale, stats, index, offsets, tokens = ctx.saved_tensors
    dy = torch.zeros_like(h) if dy is None else dy
    offsets, tokens = csr(index, offsets, tokens, gate.shape[0])
    d_residual, d_branch, d_tables = _gated_residual_adaln_backward(
        dh, dy, h, branch, gate, scale, stats, index, offsets, tokens, any(ctx.needs_input_grad[2:5])
    )
    return d_residual, d_branch, *table_gradients(d_tables, 3), None, None, None, None


_gated_residual_adaln.register_autograd(_backward, setup_context=_save)
