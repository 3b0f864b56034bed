"""adaln: LayerNorm or RMSNorm, scaled and shifted by the row of a modulation table that each token points to."""

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
    gather_rows,
    guarded,
    offered_rows,
    parts,
    table_gradients,
    table_kind,
    widened,
    without_padding,
)
from sora_fast.ops._norm import (
    affine_gradients,
    check_norm,
    contiguous,
    fake_affine,
    fake_stats,
    plain_norm,
    sums_asked,
)
from sora_fast.ops._op import kernels, op


def adaln(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Index,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """(norm(x) · weight + bias) · (1 + scale[index]) + shift[index] (adaLN of DiT, arXiv:2212.09748).

    x: [N, C], bf16, fp16 or fp32 (fp64 on the torch backend), any strides.
    shift, scale: [M, C] in fp32 or in x's dtype, any strides (chunks of one [M, 6C], say). None is left out of the
        formula and of all that is read and kept, which zeros are not.
    index: [N] int32, the row of each token, −1 for padding; or a RowIndex, which saves the backward pass a sort.
        Rows are not checked to be below M. (Without any table it says only which tokens are padding.)
    norm: "layer" or "rms", LayerNorm or RMSNorm (arXiv:1910.07467) of every row.
    weight, bias: [C] in fp32 or in x's dtype, each on its own; None costs nothing.

    Returns [N, C] in x's dtype; statistics are fp32. Padding gives zeros, in the gradients too, whatever stands there.
    Raises TypeError or ValueError for arguments that do not fit together.
    """
    _check(x, shift, scale, index, norm, weight, bias, eps)
    if backend_for(x, backend) == "torch":
        return plain_adaln(x, shift, scale, index, norm, weight, bias, eps)
    return _adaln(x, shift, scale, contiguous(weight), contiguous(bias), *parts(index), norm, eps)[0]


def backend_for(x: Tensor, backend: str | None = None) -> str:
    """Which backend runs here."""
    return choose("adaln", backend, x.device, offered_rows(x), x.dtype)


def plain_adaln(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Index,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The torch backend."""
    factor = None if scale is None else gather_rows(1 + widened(scale), index)
    if weight is None and bias is None:
        x, dtype = guarded(x, index), x.dtype
    else:  # they are no token's own: only zeros keep what padding holds from their gradients
        x, dtype = without_padding(x, index), x.dtype
        factor = None if factor is None else without_padding(factor, index)
    y = modulated(plain_norm(widened(x), norm, weight, bias, eps), shift, factor, index)
    return without_padding(y, index).to(dtype)


def modulated(y: Tensor, shift: Tensor | None, factor: Tensor | None, index: Index) -> Tensor:
    """y · factor + shift[index], where y and the factor are [N, C]. Each is left out if it is None."""
    if shift is None:
        return y if factor is None else y * factor
    shift = gather_rows(shift, index)
    return shift + y if factor is None else torch.addcmul(shift, y, factor)


@op("sora_fast::adaln")
def _adaln(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
    offsets: Tensor | None,  # only the backward pass reads these two
    tokens: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return kernels("adaln").adaln_forward(x, shift, scale, weight, bias, index, eps=eps, centred=norm == "layer")


@op("sora_fast::adaln_backward")
def _adaln_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    index: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    norm: str,
    d_shift: bool,  # whether anybody asks for it
    d_scale: bool,
    dtype: torch.dtype,  # of both
) -> tuple[Tensor, Tensor, Tensor]:
    from sora_fast.kernels.adaln import adaln_backward

    options = {"centred": norm == "layer", "asked": (d_shift, d_scale), "dtype": dtype}
    return adaln_backward(dy, x, scale, weight, bias, stats, index, offsets, tokens, **options)


@_adaln.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, norm, _ = rest
    return x.new_empty(x.shape), fake_stats(x, norm)


@_adaln_backward.register_fake
def _(
    dy: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, offsets, *_, d_shift, d_scale, dtype = rest
    asked = d_shift, d_scale
    return x.new_empty(x.shape), fake_tables(x, asked, offsets, dtype), fake_affine(x, weight, bias, any(asked))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, weight, bias, *rows, norm, _ = inputs
    _, stats = output
    ctx.save_for_backward(x, scale, weight, bias, stats, *rows)
    ctx.norm, ctx.given, ctx.tables = norm, (shift is not None, scale is not None), table_kind(shift, scale)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, scale, weight, bias, stats, *rows = ctx.saved_tensors
    num_rows, dtype = ctx.tables
    _, shift_needed, scale_needed, *affine_needed = ctx.needs_input_grad[:5]
    asked = sums_asked(shift_needed, scale_needed, any(affine_needed), weight, bias)
    saved = x, scale, weight, bias, stats, *by_rows(*rows, num_rows)
    dx, d_tables, d_affine = _adaln_backward(dy, *saved, ctx.norm, *asked, dtype)
    gradients = dx, *table_gradients(d_tables, asked, ctx.given), *affine_gradients(d_affine, weight, bias)
    return *gradients, *(None,) * 5


_adaln.register_autograd(_backward, setup_context=_save)


@once
def _check(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Index,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    check_modulated({"x": x}, {"shift": shift, "scale": scale}, index)
    check_norm("x", x, norm, weight, bias, eps)
