"""adaln_pair: one norm, two modulations of it."""

from typing import Any

import torch
from torch import Tensor

from sora_fast.ops._checks import once
from sora_fast.ops._modulation import (
    Index,
    by_rows,
    check_modulated,
    fake_tables,
    gather_rows,
    guarded,
    parts,
    table_gradients,
    table_kind,
    widened,
    without_padding,
)
from sora_fast.ops._norm import check_norm, fake_stats, plain_norm
from sora_fast.ops._op import kernels, op
from sora_fast.ops.adaln import backend_for, modulated

Modulation = tuple[Tensor | None, Tensor | None]


def adaln_pair(
    x: Tensor,
    first: Modulation,
    second: Modulation,
    index: Index,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """norm(x) · (1 + scale[index]) + shift[index], for two modulations (shift, scale) of one norm: what goes into the
    two attentions of SD3.5's dual blocks. A form of `adaln`, and on `explain`'s list as that.

    first, second: (shift, scale), each as `adaln` takes it, so any may be None. All else, and what padding gives, is
        `adaln`'s too, but the norm has no weight and no bias: no model that is modulated twice gives it one.

    Returns two [N, C] in x's dtype. On Triton x is read once, 6C bytes a token in bf16 for 8C, backward 8C for 18C, and
    kept once.
    """
    tables = *_two("first", first), *_two("second", second)
    _check(x, *tables, index, norm, eps)
    if backend_for(x, backend) == "torch":
        return _plain(x, first, second, index, norm, eps)
    return _adaln_pair(x, *tables, *parts(index), norm, eps)[:2]


def _plain(
    x: Tensor, first: Modulation, second: Modulation, index: Index, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    """The torch backend."""
    normed = plain_norm(widened(guarded(x, index)), norm, None, None, eps)

    def output(shift: Tensor | None, scale: Tensor | None) -> Tensor:
        factor = None if scale is None else gather_rows(1 + widened(scale), index)
        return without_padding(modulated(normed, shift, factor, index), index).to(x.dtype)

    return output(*first), output(*second)


def _two(name: str, modulation: Modulation) -> Modulation:
    if not isinstance(modulation, tuple) or len(modulation) != 2:
        what = f"{len(modulation)} values" if isinstance(modulation, tuple) else type(modulation).__name__
        raise TypeError(f"{name}: {what}; it must be a tuple (shift, scale)")
    return modulation


@op("sora_fast::adaln_pair")
def _adaln_pair(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_second: Tensor | None,
    scale_second: Tensor | None,
    index: Tensor,
    offsets: Tensor | None,  # only the backward pass reads these two
    tokens: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    forward = kernels("adaln").adaln_pair_forward
    return forward(x, (shift, scale), (shift_second, scale_second), index, eps=eps, centred=norm == "layer")


@op("sora_fast::adaln_pair_backward")
def _adaln_pair_backward(
    dy: Tensor,
    dy_second: Tensor,
    x: Tensor,
    scale: Tensor | None,
    scale_second: Tensor | None,
    stats: Tensor,
    index: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    norm: str,
    d_shift: bool,  # whether anybody asks for it
    d_scale: bool,
    d_shift_second: bool,
    d_scale_second: bool,
    dtype: torch.dtype,  # of these four
) -> tuple[Tensor, Tensor]:
    tensors = dy, dy_second, x, scale, scale_second, stats, index, offsets, tokens
    asked = d_shift, d_scale, d_shift_second, d_scale_second
    return kernels("adaln").adaln_pair_backward(*tensors, centred=norm == "layer", asked=asked, dtype=dtype)


@_adaln_pair.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, norm, _ = rest
    return x.new_empty(x.shape), x.new_empty(x.shape), fake_stats(x, norm)


@_adaln_pair_backward.register_fake
def _(dy: Tensor, dy_second: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, _, _, offsets, _, _, *asked, dtype = rest
    return x.new_empty(x.shape), fake_tables(x, tuple(asked), offsets, dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, shift_second, scale_second, *rows, norm, _ = inputs
    *_, stats = output
    ctx.save_for_backward(x, scale, scale_second, stats, *rows)
    tables = shift, scale, shift_second, scale_second
    ctx.norm, ctx.tables = norm, table_kind(*tables)
    ctx.given = tuple(table is not None for table in tables)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dy_second: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, scale, scale_second, stats, *rows = ctx.saved_tensors
    num_rows, dtype = ctx.tables
    dy, dy_second = (torch.zeros_like(x) if grad is None else grad for grad in (dy, dy_second))
    asked = tuple(ctx.needs_input_grad[1:5])
    saved = x, scale, scale_second, stats, *by_rows(*rows, num_rows)
    dx, d_tables = _adaln_pair_backward(dy, dy_second, *saved, ctx.norm, *asked, dtype)
    return dx, *table_gradients(d_tables, asked, ctx.given), *(None,) * 5


_adaln_pair.register_autograd(_backward, setup_context=_save)


@once
def _check(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_second: Tensor | None,
    scale_second: Tensor | None,
    index: Index,
    norm: str,
    eps: float,
) -> None:
    tables = {"first's shift": shift, "first's scale": scale, "second's shift": shift_second}
    check_modulated({"x": x}, {**tables, "second's scale": scale_second}, index)
    check_norm("x", x, norm, None, None, eps)
