"""adaln: LayerNorm without affine, scaled and shifted by the token's row of the modulation table."""

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
    layer_norm,
    layer_norm_backward,
    load_fp32,
    store_partial,
    store_zeros,
    walk,
)


def adaln_forward(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The output [N, C], and for the backward pass mean and 1/std, [2, N] fp32. Any strides."""
    tokens, width = x.shape
    y = x.new_empty(tokens, width)
    stats = x.new_empty(2, tokens, dtype=torch.float32)
    block = RowBlock.forward(width)
    launch(
        _forward,
        (triton.cdiv(tokens, block.tokens),),
        *(x, shift, scale, index, y, stats, tokens),
        *(x.stride(), shift.stride(), scale.stride()),
        **{"WIDTH": width, "EPS": eps, "BLOCK_N": block.tokens, "BLOCK_C": block.columns},
        num_warps=block.num_warps,
    )
    return y, stats


def adaln_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    stats: Tensor,
    index: Tensor,
    offsets: Tensor,
    order: Tensor,
    *,
    tables: bool,
) -> tuple[Tensor, Tensor]:
    """d_x [N, C], and d_shift and d_scale as one [2, M, C] in the table's dtype.

    offsets [M+1], order [N]: the tokens sorted by row, with padding past offsets[M]. tables: False: [0, M, C] in place
    of the tables' gradients.
    """
    tokens, width = x.shape
    rows = scale.shape[0]
    dx = x.new_empty(tokens, width)
    partials = empty_partials(tokens, rows, 2, x) if tables else None
    block = RowBlock.backward(width)
    launch(
        _backward,
        (triton.cdiv(tokens, CHUNK),),
        *(dy, x, scale, stats, index, offsets, order, dx, partials, tokens, rows),
        *(dy.stride(), x.stride(), scale.stride()),
        **{"WIDTH": width, "BLOCK_C": block.columns, "CHUNK": CHUNK},
        num_warps=block.num_warps,
    )
    return dx, fold(partials, offsets, scale)


@triton.jit
def _forward(
    x,
    shift,
    scale,
    index,
    y,
    stats,
    tokens,
    x_strides,
    shift_strides,
    scale_strides,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_C)[None, :]
    exists = token < tokens
    row = tl.load(index + token, mask=exists, other=-1)
    inside = column < WIDTH
    used = inside & (row >= 0)[:, None]
    # Padding is read as zeros, shift too, and so comes out as zeros.
    values = load_fp32(x, x_strides, token[:, None], column, used)
    normed, mean, rstd = layer_norm(values, inside, WIDTH, EPS)
    factor = 1.0 + load_fp32(scale, scale_strides, row[:, None], column, used)
    result = normed * factor + load_fp32(shift, shift_strides, row[:, None], column, used)
    tl.store(y + token.to(tl.int64)[:, None] * WIDTH + column, result, mask=inside & exists[:, None])
    tl.store(stats + token, mean, mask=exists)
    tl.store(stats + tokens + token, rstd, mask=exists)


@triton.jit
def _backward(
    dy,
    x,
    scale,
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
        mean, rstd = tl.load(stats + token), tl.load(stats + tokens + token)
        normed = (values - mean) * rstd
        d_shift += gradient
        d_scale += gradient * normed
        d_normed = gradient * (1.0 + load_fp32(scale, scale_strides, row, column, inside))
        result = layer_norm_backward(d_normed, normed, rstd, WIDTH)
        tl.store(dx + token.to(tl.int64) * WIDTH + column, result, mask=inside)
        if ends:
            store_partial(partials, chunk + row, 0, column, d_shift, WIDTH, 2)
            store_partial(partials, chunk + row, 1, column, d_scale, WIDTH, 2)
            d_shift = tl.zeros([BLOCK_C], dtype=tl.float32)
            d_scale = tl.zeros([BLOCK_C], dtype=tl.float32)
    store_zeros(dx, order, middle, end, column, WIDTH)
