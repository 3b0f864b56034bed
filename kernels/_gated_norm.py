"""gated_residual with a norm: the branch is normed before its gate, in the same pass over memory."""

# ruff: noqa: RUF005 (Triton adds tuples and does not unpack them)

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._launch import cdiv, launch
from sora_fast.kernels._rows import (
    CHUNK,
    MOST_REGISTERS,
    RowBlock,
    Sums,
    fold,
    load_normed,
    load_row,
    load_vector,
    norm_again,
    norm_gradient,
    norm_rows,
    only_used,
    row_columns,
    run_of,
    store_row,
    store_sums,
    store_zeros,
    strides,
    walk,
    widened,
    zero_row,
)


def gated_norm_forward(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    index: Tensor,
    *,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """The output [N, C], and 1/std of every row of the branch, and its mean, [2, N] fp32. Any strides.

    weight: [C] contiguous, of the norm. centred: LayerNorm; else RMSNorm, whose statistics are [1, N].
    """
    tokens, width = residual.shape
    out = residual.new_empty(tokens, width)
    stats = residual.new_empty(1 + centred, tokens, dtype=torch.float32)
    launch(
        gated_norm_forward_kernel,
        (tokens,),
        *(residual, branch, gate, weight, index, out, stats, tokens),
        *(residual.stride(), branch.stride(), strides(gate)),
        **{"WIDTH": width, "EPS": eps, "CENTRED": centred},
        **RowBlock.forward(width).meta,
    )
    return out, stats


def gated_norm_backward(
    d_out: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    index: Tensor,
    offsets: Tensor,
    order: Tensor,
    *,
    centred: bool,
    sums: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_residual, d_branch [N, C], and the sums over every row's tokens of d_out · normed, as [1, M, C] in `dtype`.

    offsets [M+1], order [N]: the tokens sorted by row, with padding past offsets[M]. sums: False: [0, M, C].
    """
    tokens, width = branch.shape
    rows = offsets.shape[0] - 1
    d_residual, d_branch = d_out.new_empty(tokens, width), branch.new_empty(tokens, width)
    asked = Sums.empty(branch, int(sums), rows, tokens, dtype=dtype)
    launch(
        gated_norm_backward_kernel,
        (cdiv(tokens, CHUNK),),
        *(d_out, branch, gate, weight, stats, index, offsets, order, d_residual, d_branch, asked, tokens, rows),
        *(d_out.stride(), branch.stride(), strides(gate)),
        **{"WIDTH": width, "CENTRED": centred, "CHUNK": CHUNK, "SUMS": sums, "maxnreg": MOST_REGISTERS},
        **RowBlock.backward(width).meta,
    )
    return d_residual, d_branch, fold(asked, offsets, branch)[0]


@triton.jit
def gated_norm_forward_kernel(
    residual, branch, gate, weight, index, out, stats, tokens, residual_strides, branch_strides, gate_strides,
    WIDTH: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    columns = row_columns(MAIN, REST)
    token = tl.program_id(0)
    # As in adaln: nothing but the gate waits for the index, and no load for a sum.
    row = tl.load(index + token)
    branches = load_row(branch, branch_strides, token, columns, WIDTH)
    streams = load_row(residual, residual_strides, token, columns, WIDTH)
    used = row >= 0
    gates = load_row(gate, gate_strides, row, columns, WIDTH, used)
    factor = gate_factor(gates, load_vector(weight, columns, WIDTH))
    normed = norm_rows(only_used(branches, used), columns, stats, token, tokens, WIDTH, EPS, CENTRED, LANES)
    result, streams = (), only_used(streams, used)
    for i in tl.static_range(len(columns)):
        result = result + (streams[i] + (normed[i] * factor[i] if len(factor) > 0 else normed[i]),)
    store_row(out, token, columns, result, WIDTH)


@triton.jit
def gate_factor(gates, weights):
    """What a normed branch is multiplied by, gate · weight; nothing if there is neither."""
    factor = widened(gates)
    if len(gates) == 0:
        factor = widened(weights)
    elif len(weights) > 0:
        factor = ()
        for i in tl.static_range(len(gates)):
            factor = factor + (gates[i].to(tl.float32) * weights[i].to(tl.float32),)
    return factor


@triton.jit
def gated_norm_backward_kernel(
    d_out, branch, gate, weight, stats, index, offsets, order, d_residual, d_branch, sums, tokens, rows,
    d_out_strides, branch_strides, gate_strides,
    WIDTH: tl.constexpr, CENTRED: tl.constexpr, CHUNK: tl.constexpr, SUMS: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    columns = row_columns(MAIN, REST)
    begin, middle, end = walk(offsets, rows, tokens, CHUNK)
    position, last = begin, end - 1
    token, following = tl.load(order + begin), tl.load(order + tl.minimum(begin + 1, last))
    ahead = load_normed(d_out, d_out_strides, branch, branch_strides, stats, token, tokens, columns, WIDTH, CENTRED)
    while position < middle:
        row, stop = run_of(index, offsets, token, position, middle)
        gates = load_row(gate, gate_strides, row, columns, WIDTH)
        factor = gate_factor(gates, load_vector(weight, columns, WIDTH))
        totals = (), zero_row(columns, SUMS)
        while position < stop:
            gradient, values, moments = ahead
            ahead = load_normed(
                d_out, d_out_strides, branch, branch_strides, stats, following, tokens, columns, WIDTH, CENTRED
            )
            after = tl.load(order + tl.minimum(position + 2, last))
            normed, d_normed, totals = norm_again(gradient, values, moments, factor, totals)
            store_row(d_residual, token, columns, gradient, WIDTH)
            result = norm_gradient(normed, d_normed, moments[1], WIDTH, CENTRED, LANES)
            store_row(d_branch, token, columns, result, WIDTH)
            token, following, position = following, after, position + 1
        store_sums(sums, totals, None, None, None, None, offsets, row, rows, columns, WIDTH, CHUNK)
    store_zeros(d_residual, order, middle, end, columns, WIDTH)
    store_zeros(d_branch, order, middle, end, columns, WIDTH)
