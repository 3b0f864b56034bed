"""adaln: LayerNorm or RMSNorm, scaled and shifted by the token's row of the modulation table."""

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


def adaln_forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
    *,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """The output [N, C], and for the backward pass 1/std of every row, and its mean, [2, N] fp32. Any strides.

    weight, bias: [C] contiguous, of the norm. centred: LayerNorm; else RMSNorm, whose statistics are [1, N].
    """
    tokens, width = x.shape
    y = x.new_empty(tokens, width)
    stats = x.new_empty(1 + centred, tokens, dtype=torch.float32)
    block = RowBlock.forward(width)
    launch(
        adaln_forward_kernel,
        (cdiv(tokens, block.tokens),),
        *(x, shift, scale, weight, bias, index, y, stats, tokens),
        *(x.stride(), shift.stride(), scale.stride()),
        **{"WIDTH": width, "EPS": eps, "CENTRED": centred, "BLOCK_N": block.tokens, "BLOCK_C": block.columns},
        num_warps=block.num_warps,
    )
    return y, stats


def adaln_backward(
    dy: Tensor,
    x: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """d_x [N, C], d_shift and d_scale as [2, M, C] in the tables' dtype, and d_weight and d_bias as [2, C] fp32.

    offsets [M+1], order [N]: the tokens sorted by row, with padding past offsets[M]. Without weight and bias, [0, C] in
    place of their gradients; sums: False: [0, M, C] and [0, C] in place of all but d_x.
    """
    tokens, width = x.shape
    rows = scale.shape[0]
    dx = x.new_empty(tokens, width)
    asked = Sums.empty(scale, 2, tokens, affine=not (weight is None and bias is None)) if sums else None
    block = RowBlock.backward(width)
    launch(
        adaln_backward_kernel,
        (cdiv(tokens, CHUNK),),
        *(dy, x, scale, weight, bias, stats, index, offsets, order, dx, asked, tokens, rows),
        *(dy.stride(), x.stride(), scale.stride()),
        **{"WIDTH": width, "CENTRED": centred, "MAIN": block.columns, "REST": block.rest, "CHUNK": CHUNK},
        num_warps=block.num_warps,
    )
    return dx, *fold(asked, offsets, scale, weight=weight, bias=bias)


@triton.jit
def adaln_forward_kernel(
    x,
    shift,
    scale,
    weight,
    bias,
    index,
    y,
    stats,
    tokens,
    x_strides,
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
    # Padding is read as zeros, shift and bias too, and so comes out as zeros.
    values = load_fp32(x, x_strides, token[:, None], column, used)
    normed = norm_rows(values, inside, stats, token, tokens, WIDTH, EPS, CENTRED)
    if weight is not None:
        normed *= load_vector(weight, column, inside)
    if bias is not None:
        normed += load_vector(bias, column, used)
    factor = 1.0 + load_fp32(scale, scale_strides, row[:, None], column, used)
    result = normed * factor + load_fp32(shift, shift_strides, row[:, None], column, used)
    tl.store(y + token.to(tl.int64)[:, None] * WIDTH + column, result, mask=inside & exists[:, None])


@triton.jit
def adaln_backward_kernel(
    dy, x, scale, weight, bias, stats, index, offsets, order, dx, sums, tokens, rows,
    dy_strides, x_strides, scale_strides,
    WIDTH: tl.constexpr, CENTRED: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    main = tl.arange(0, MAIN)
    main_sums = zero_sums(MAIN)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        rest_sums = zero_sums(REST)
    begin, middle, end = walk(offsets, rows, tokens, CHUNK)
    for position in range(begin, middle):
        token = tl.load(order + position)
        row = tl.load(index + token)
        ends = position + 1 == tl.minimum(middle, tl.load(offsets + row + 1))
        mean, rstd = load_stats(stats, token, tokens, CENTRED)
        normed, d_normed, main_sums = read_row(
            dy, dy_strides, x, x_strides, scale, scale_strides, weight, mean, rstd, token, row, main, main_sums, WIDTH
        )
        totals = norm_totals(normed, d_normed, CENTRED)
        if REST > 0:
            normed_rest, d_normed_rest, rest_sums = read_row(
                dy,
                dy_strides,
                x,
                x_strides,
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
        out = dx + token.to(tl.int64) * WIDTH
        tl.store(out + main, norm_gradient(normed, d_normed, rstd, totals, WIDTH, CENTRED), mask=main < WIDTH)
        if REST > 0:
            result = norm_gradient(normed_rest, d_normed_rest, rstd, totals, WIDTH, CENTRED)
            tl.store(out + rest, result, mask=rest < WIDTH)
        if ends:
            store_sums(sums, main_sums, scale, scale_strides, weight, bias, offsets, row, rows, main, WIDTH, CHUNK)
            main_sums = zero_sums(MAIN)
            if REST > 0:
                store_sums(sums, rest_sums, scale, scale_strides, weight, bias, offsets, row, rows, rest, WIDTH, CHUNK)
                rest_sums = zero_sums(REST)
    store_zeros(dx, order, middle, end, main, WIDTH)
    if REST > 0:
        store_zeros(dx, order, middle, end, rest, WIDTH)
