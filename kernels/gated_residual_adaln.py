"""gated_residual_adaln: the gate of one branch and the norm of the next, in a single pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._launch import cdiv, launch
from sora_fast.kernels._rows import (
    CHUNK,
    RowBlock,
    Sums,
    fold,
    load_fp32,
    load_stats,
    load_vector,
    norm_gradient,
    norm_rows,
    norm_totals,
    read_row,
    store_sums,
    store_zeros,
    walk,
    zero_sums,
)


def gated_residual_adaln_forward(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
    *,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The new residual h and its norm y [N, C], and 1/std of every row of h, and its mean, [2, N] fp32. Any strides.

    weight, bias: [C] contiguous, of the norm. centred: LayerNorm; else RMSNorm, whose statistics are [1, N].
    """
    tokens, width = residual.shape
    h, y = residual.new_empty(tokens, width), residual.new_empty(tokens, width)
    stats = residual.new_empty(1 + centred, tokens, dtype=torch.float32)
    block = RowBlock.forward(width)
    launch(
        gated_residual_adaln_forward_kernel,
        (cdiv(tokens, block.tokens),),
        *(residual, branch, gate, shift, scale, weight, bias, index, h, y, stats, tokens),
        *(residual.stride(), branch.stride(), gate.stride(), shift.stride(), scale.stride()),
        **{"WIDTH": width, "EPS": eps, "CENTRED": centred, "BLOCK_N": block.tokens, "BLOCK_C": block.columns},
        num_warps=block.num_warps,
    )
    return h, y, stats


def gated_residual_adaln_backward(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    index: Tensor,
    offsets: Tensor,
    order: Tensor,
    *,
    centred: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_residual and d_branch [N, C], d_gate, d_shift and d_scale as [3, M, C] in the tables' dtype, and d_weight and
    d_bias as [2, C] fp32.

    dh: None where nothing but the norm uses h. offsets [M+1], order [N]: the tokens sorted by row, with padding past
    offsets[M]. Without weight and bias, [0, C] in place of their gradients; sums: False: [0, M, C] and [0, C] in place
    of all but the first two, and the branch is not read.
    """
    tokens, width = h.shape
    rows = gate.shape[0]
    d_residual, d_branch = h.new_empty(tokens, width), branch.new_empty(tokens, width)
    asked = Sums.empty(scale, 3, tokens, affine=not (weight is None and bias is None)) if sums else None
    block = RowBlock.backward(width)
    launch(
        gated_residual_adaln_backward_kernel,
        (cdiv(tokens, CHUNK),),
        *(dh, dy, h, branch, gate, scale, weight, bias, stats, index, offsets, order),
        *(d_residual, d_branch, asked, tokens, rows),
        *((dy if dh is None else dh).stride(), dy.stride(), h.stride()),
        *(branch.stride(), gate.stride(), scale.stride()),
        **{"WIDTH": width, "CENTRED": centred, "MAIN": block.columns, "REST": block.rest, "CHUNK": CHUNK},
        num_warps=block.num_warps,
    )
    return d_residual, d_branch, *fold(asked, offsets, scale, weight=weight, bias=bias)


@triton.jit
def gated_residual_adaln_forward_kernel(
    residual,
    branch,
    gate,
    shift,
    scale,
    weight,
    bias,
    index,
    h,
    y,
    stats,
    tokens,
    residual_strides,
    branch_strides,
    gate_strides,
    shift_strides,
    scale_strides,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_C)[None, :]
    exists = token < tokens
    row = tl.load(index + token, mask=exists, other=-1)
    inside = column < WIDTH
    used = inside & (row >= 0)[:, None]
    written = token.to(tl.int64)[:, None] * WIDTH + column
    total = load_fp32(residual, residual_strides, token[:, None], column, used)
    factor = load_fp32(gate, gate_strides, row[:, None], column, used)
    total += factor * load_fp32(branch, branch_strides, token[:, None], column, used)
    tl.store(h + written, total, mask=inside & exists[:, None])
    # The norm of h as it is stored: the backward pass sees no other.
    total = total.to(h.dtype.element_ty).to(tl.float32)
    normed = norm_rows(total, inside, stats, token, tokens, WIDTH, EPS, CENTRED)
    if weight is not None:
        normed *= load_vector(weight, column, inside)
    if bias is not None:
        normed += load_vector(bias, column, used)
    factor = 1.0 + load_fp32(scale, scale_strides, row[:, None], column, used)
    result = normed * factor + load_fp32(shift, shift_strides, row[:, None], column, used)
    tl.store(y + written, result, mask=inside & exists[:, None])


@triton.jit
def gated_residual_adaln_backward_kernel(
    dh, dy, h, branch, gate, scale, weight, bias, stats, index, offsets, order,
    d_residual, d_branch, sums, tokens, rows,
    dh_strides, dy_strides, h_strides, branch_strides, gate_strides, scale_strides,
    WIDTH: tl.constexpr, CENTRED: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    main = tl.arange(0, MAIN)
    main_gate, main_sums = tl.zeros([MAIN], tl.float32), zero_sums(MAIN)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        rest_gate, rest_sums = tl.zeros([REST], tl.float32), zero_sums(REST)
    begin, middle, end = walk(offsets, rows, tokens, CHUNK)
    for position in range(begin, middle):
        token = tl.load(order + position)
        row = tl.load(index + token)
        ends = position + 1 == tl.minimum(middle, tl.load(offsets + row + 1))
        mean, rstd = load_stats(stats, token, tokens, CENTRED)
        normed, d_normed, main_sums = read_row(
            dy, dy_strides, h, h_strides, scale, scale_strides, weight, mean, rstd, token, row, main, main_sums, WIDTH
        )
        totals = norm_totals(normed, d_normed, CENTRED)
        if REST > 0:
            normed_rest, d_normed_rest, rest_sums = read_row(
                dy,
                dy_strides,
                h,
                h_strides,
                scale,
                scale_strides,
                weight,
                mean,
                rstd,
                token,
                row,
                rest,
                rest_sums,
                WIDTH,
            )
            totals += norm_totals(normed_rest, d_normed_rest, CENTRED)
        d_h = norm_gradient(normed, d_normed, rstd, totals, WIDTH, CENTRED)
        main_gate += _gradients(
            d_h, dh, dh_strides, branch, branch_strides, gate, gate_strides, d_residual, d_branch, sums, token, row,
            main, WIDTH,
        )  # fmt: skip
        if REST > 0:
            d_h = norm_gradient(normed_rest, d_normed_rest, rstd, totals, WIDTH, CENTRED)
            rest_gate += _gradients(
                d_h, dh, dh_strides, branch, branch_strides, gate, gate_strides, d_residual, d_branch, sums, token, row,
                rest, WIDTH,
            )  # fmt: skip
        if ends:
            values = main_gate, main_sums[0], main_sums[1]
            store_sums(sums, values, scale, scale_strides, weight, bias, offsets, row, rows, main, WIDTH, CHUNK)
            main_gate, main_sums = tl.zeros([MAIN], tl.float32), zero_sums(MAIN)
            if REST > 0:
                values = rest_gate, rest_sums[0], rest_sums[1]
                store_sums(sums, values, scale, scale_strides, weight, bias, offsets, row, rows, rest, WIDTH, CHUNK)
                rest_gate, rest_sums = tl.zeros([REST], tl.float32), zero_sums(REST)
    store_zeros(d_residual, order, middle, end, main, WIDTH)
    store_zeros(d_branch, order, middle, end, main, WIDTH)
    if REST > 0:
        store_zeros(d_residual, order, middle, end, rest, WIDTH)
        store_zeros(d_branch, order, middle, end, rest, WIDTH)


@triton.jit
def _gradients(
    total, dh, dh_strides, branch, branch_strides, gate, gate_strides, d_residual, d_branch, sums, token, row, column,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Store both gradients of some columns of a token, and return what the token adds to the gate's.

    total: the gradient of h through its norm.
    """
    inside = column < WIDTH
    if dh is not None:
        total += load_fp32(dh, dh_strides, token, column, inside)
    place = token.to(tl.int64) * WIDTH + column
    tl.store(d_residual + place, total, mask=inside)
    d_gate = tl.zeros_like(total)
    if sums is not None:
        d_gate = total * load_fp32(branch, branch_strides, token, column, inside)
    tl.store(d_branch + place, total * load_fp32(gate, gate_strides, row, column, inside), mask=inside)
    return d_gate
