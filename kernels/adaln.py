"""adaln: LayerNorm or RMSNorm, scaled and shifted by the token's row of the modulation table."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._adaln_pair import adaln_pair_backward as adaln_pair_backward
from sora_fast.kernels._adaln_pair import adaln_pair_forward as adaln_pair_forward
from sora_fast.kernels._launch import cdiv, launch
from sora_fast.kernels._rows import (
    CHUNK,
    MOST_REGISTERS,
    RowBlock,
    Sums,
    fold,
    load_factor,
    load_normed,
    load_row,
    load_vector,
    modulate,
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
    zero_row,
)


def adaln_forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
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
    launch(
        adaln_forward_kernel,
        (tokens,),
        *(x, shift, scale, weight, bias, index, y, stats, tokens),
        *(x.stride(), strides(shift), strides(scale)),
        **{"WIDTH": width, "EPS": eps, "CENTRED": centred},
        **RowBlock.forward(width).meta,
    )
    return y, stats


def adaln_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    index: Tensor,
    offsets: Tensor,
    order: Tensor,
    *,
    centred: bool,
    asked: tuple[bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_x [N, C], d_shift and d_scale as [2, M, C] in `dtype`, and d_weight and d_bias as [2, C] fp32.

    offsets [M+1], order [N]: the tokens sorted by row, with padding past offsets[M]. asked: whether anybody wants
    d_shift, and d_scale; of an affine norm both or none. What is not wanted is not there: [1, M, C] or [0, M, C].
    Without weight and bias, or if nothing is asked for, [0, C] in place of their gradients.
    """
    tokens, width = x.shape
    rows = offsets.shape[0] - 1
    dx = x.new_empty(tokens, width)
    sums = Sums.empty(x, sum(asked), rows, tokens, dtype=dtype, affine=not (weight is None and bias is None))
    launch(
        adaln_backward_kernel,
        (cdiv(tokens, CHUNK),),
        *(dy, x, scale, weight, bias, stats, index, offsets, order, dx, sums, tokens, rows),
        *(dy.stride(), x.stride(), strides(scale)),
        **{"WIDTH": width, "CENTRED": centred, "CHUNK": CHUNK, "maxnreg": MOST_REGISTERS},
        **{"SHIFT": asked[0], "SCALE": asked[1]},
        **RowBlock.backward(width).meta,
    )
    return dx, *fold(sums, offsets, x, scale=scale, weight=weight, bias=bias)


@triton.jit
def adaln_forward_kernel(
    x, shift, scale, weight, bias, index, y, stats, tokens, x_strides, shift_strides, scale_strides,
    WIDTH: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    columns = row_columns(MAIN, REST)
    token = tl.program_id(0)
    # All that is read is on its way before the first sum is waited for, and x does not wait for the index: padding is
    # read too, and dropped.
    row = tl.load(index + token)
    values = load_row(x, x_strides, token, columns, WIDTH)
    used = row >= 0
    scales = load_row(scale, scale_strides, row, columns, WIDTH, used)
    shifts = load_row(shift, shift_strides, row, columns, WIDTH, used)
    weights, biases = load_vector(weight, columns, WIDTH), load_vector(bias, columns, WIDTH)
    normed = norm_rows(only_used(values, used), columns, stats, token, tokens, WIDTH, EPS, CENTRED, LANES)
    store_row(y, token, columns, modulate(normed, weights, biases, shifts, scales, used), WIDTH)


@triton.jit
def adaln_backward_kernel(
    dy, x, scale, weight, bias, stats, index, offsets, order, dx, sums, tokens, rows,
    dy_strides, x_strides, scale_strides,
    WIDTH: tl.constexpr, CENTRED: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    columns = row_columns(MAIN, REST)
    begin, middle, end = walk(offsets, rows, tokens, CHUNK)
    position, last = begin, end - 1
    token, following = tl.load(order + begin), tl.load(order + tl.minimum(begin + 1, last))
    ahead = load_normed(dy, dy_strides, x, x_strides, stats, token, tokens, columns, WIDTH, CENTRED)
    while position < middle:
        row, stop = run_of(index, offsets, token, position, middle)
        factor = load_factor(scale, scale_strides, weight, row, columns, WIDTH)
        totals = zero_row(columns, SHIFT), zero_row(columns, SCALE)
        while position < stop:
            gradient, values, moments = ahead
            ahead = load_normed(dy, dy_strides, x, x_strides, stats, following, tokens, columns, WIDTH, CENTRED)
            after = tl.load(order + tl.minimum(position + 2, last))
            normed, d_normed, totals = norm_again(gradient, values, moments, factor, totals)
            result = norm_gradient(normed, d_normed, moments[1], WIDTH, CENTRED, LANES)
            store_row(dx, token, columns, result, WIDTH)
            token, following, position = following, after, position + 1
        store_sums(sums, totals, scale, scale_strides, weight, bias, offsets, row, rows, columns, WIDTH, CHUNK)
    store_zeros(dx, order, middle, end, columns, WIDTH)
