"""adaln: LayerNorm or RMSNorm, scaled and shifted by the token's row of the modulation table."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._launch import launch
from sora_fast.kernels._rows import (
    CHUNK,
    RowBlock,
    empty_partials,
    fold,
    load_fp32,
    load_vector,
    norm_backward,
    norm_rows,
    normed_again,
    store_partial,
    store_zeros,
    walk,
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
        _forward,
        (triton.cdiv(tokens, block.tokens),),
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
    partials = empty_partials(tokens, rows, 2, x) if sums else None
    block = RowBlock.backward(width)
    launch(
        _backward,
        (triton.cdiv(tokens, CHUNK),),
        *(dy, x, scale, weight, stats, index, offsets, order, dx, partials, tokens, rows),
        *(dy.stride(), x.stride(), scale.stride()),
        **{"WIDTH": width, "CENTRED": centred, "BLOCK_C": block.columns, "CHUNK": CHUNK},
        num_warps=block.num_warps,
    )
    return dx, *fold(partials, offsets, scale, weight=weight, bias=bias)


@triton.jit
def _forward(
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
def _backward(
    dy,
    x,
    scale,
    weight,
    stats,
    index,
    offsets,
    order,
    dx,
    partials,
    tokens,
    rows,
    dy_strides,
    x_strides,
    scale_strides,
    WIDTH: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    column = tl.arange(0, BLOCK_C)
    inside = column < WIDTH
    d_shift = tl.zeros([BLOCK_C], dtype=tl.float32)
    d_scale = tl.zeros([BLOCK_C], dtype=tl.float32)
    begin, middle, end = walk(offsets, rows, tokens, CHUNK)
    for position in range(begin, middle):
        token = tl.load(order + position)
        row = tl.load(index + token)
        ends = position + 1 == tl.minimum(middle, tl.load(offsets + row + 1))
        gradient = load_fp32(dy, dy_strides, token, column, inside)
        values = load_fp32(x, x_strides, token, column, inside)
        normed, rstd = normed_again(values, stats, token, tokens, CENTRED)
        d_shift += gradient
        d_scale += gradient * normed
        d_normed = gradient * (1.0 + load_fp32(scale, scale_strides, row, column, inside))
        if weight is not None:
            d_normed *= load_vector(weight, column, inside)
        result = norm_backward(d_normed, normed, rstd, WIDTH, CENTRED)
        tl.store(dx + token.to(tl.int64) * WIDTH + column, result, mask=inside)
        if ends:
            store_partial(partials, chunk + row, 0, column, d_shift, WIDTH, 2)
            store_partial(partials, chunk + row, 1, column, d_scale, WIDTH, 2)
            d_shift = tl.zeros([BLOCK_C], dtype=tl.float32)
            d_scale = tl.zeros([BLOCK_C], dtype=tl.float32)
    store_zeros(dx, order, middle, end, column, WIDTH)
