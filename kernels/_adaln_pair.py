"""adaln with two modulations of one norm: one read of the tokens, two outputs."""

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
    load_factor,
    load_normed,
    load_row,
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

Tables = tuple[Tensor | None, Tensor | None]

# A thread's registers in the backward pass: four sums and two gradients more than fit into `MOST_REGISTERS`, but where
# 16 warps hold a row, which have no more.
_ROOMY = 168


def adaln_pair_forward(
    x: Tensor, first: Tables, second: Tables, index: Tensor, *, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The two outputs [N, C], and 1/std of every row, and its mean, [2, N] fp32. Any strides.

    first, second: shift and scale. centred: LayerNorm; else RMSNorm, whose statistics are [1, N].
    """
    tokens, width = x.shape
    y, y_second = x.new_empty(tokens, width), x.new_empty(tokens, width)
    stats = x.new_empty(1 + centred, tokens, dtype=torch.float32)
    launch(
        adaln_pair_forward_kernel,
        (tokens,),
        *(x, *first, *second, index, y, y_second, stats, tokens),
        *(x.stride(), *map(strides, first), *map(strides, second)),
        **{"WIDTH": width, "EPS": eps, "CENTRED": centred},
        **RowBlock.forward(width).meta,
    )
    return y, y_second, stats


def adaln_pair_backward(
    dy: Tensor,
    dy_second: Tensor,
    x: Tensor,
    scale: Tensor | None,
    scale_second: Tensor | None,
    stats: Tensor,
    index: Tensor,
    offsets: Tensor,
    order: Tensor,
    *,
    centred: bool,
    asked: tuple[bool, bool, bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """d_x [N, C], and d_shift and d_scale of the first and of the second modulation, as [4, M, C] in `dtype`.

    offsets [M+1], order [N]: the tokens sorted by row, with padding past offsets[M]. asked: which of the four anybody
    wants; the others are not there: [3, M, C], and so on.
    """
    tokens, width = x.shape
    rows = offsets.shape[0] - 1
    dx = x.new_empty(tokens, width)
    sums = Sums.empty(x, sum(asked), rows, tokens, dtype=dtype)
    block = RowBlock.backward(width)
    launch(
        adaln_pair_backward_kernel,
        (cdiv(tokens, CHUNK),),
        *(dy, dy_second, x, scale, scale_second, stats, index, offsets, order, dx, sums, tokens, rows),
        *(dy.stride(), dy_second.stride(), x.stride(), strides(scale), strides(scale_second)),
        **{"WIDTH": width, "CENTRED": centred, "CHUNK": CHUNK, "ASKED": asked},
        **block.meta,
        maxnreg=_ROOMY if block.num_warps < 16 else MOST_REGISTERS,
    )
    return dx, fold(sums, offsets, x)[0]


@triton.jit
def adaln_pair_forward_kernel(
    x, shift, scale, shift_second, scale_second, index, y, y_second, stats, tokens,
    x_strides, shift_strides, scale_strides, shift_second_strides, scale_second_strides,
    WIDTH: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    columns = row_columns(MAIN, REST)
    token = tl.program_id(0)
    # As in adaln: nothing but the tables waits for the index, and no load for a sum.
    row = tl.load(index + token)
    values = load_row(x, x_strides, token, columns, WIDTH)
    used = row >= 0
    scales = load_row(scale, scale_strides, row, columns, WIDTH, used)
    shifts = load_row(shift, shift_strides, row, columns, WIDTH, used)
    other_scales = load_row(scale_second, scale_second_strides, row, columns, WIDTH, used)
    other_shifts = load_row(shift_second, shift_second_strides, row, columns, WIDTH, used)
    normed = norm_rows(only_used(values, used), columns, stats, token, tokens, WIDTH, EPS, CENTRED, LANES)
    store_row(y, token, columns, modulate(normed, (), (), shifts, scales, used), WIDTH)
    store_row(y_second, token, columns, modulate(normed, (), (), other_shifts, other_scales, used), WIDTH)


@triton.jit
def adaln_pair_backward_kernel(
    dy, dy_second, x, scale, scale_second, stats, index, offsets, order, dx, sums, tokens, rows,
    dy_strides, dy_second_strides, x_strides, scale_strides, scale_second_strides,
    WIDTH: tl.constexpr, CENTRED: tl.constexpr, CHUNK: tl.constexpr, ASKED: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    columns = row_columns(MAIN, REST)
    begin, middle, end = walk(offsets, rows, tokens, CHUNK)
    position, last = begin, end - 1
    token, following = tl.load(order + begin), tl.load(order + tl.minimum(begin + 1, last))
    ahead = load_normed(dy, dy_strides, x, x_strides, stats, token, tokens, columns, WIDTH, CENTRED)
    while position < middle:
        row, stop = run_of(index, offsets, token, position, middle)
        factor = load_factor(scale, scale_strides, None, row, columns, WIDTH)
        other_factor = load_factor(scale_second, scale_second_strides, None, row, columns, WIDTH)
        totals = zero_row(columns, ASKED[0]), zero_row(columns, ASKED[1])
        other_totals = zero_row(columns, ASKED[2]), zero_row(columns, ASKED[3])
        while position < stop:
            gradient, values, moments = ahead
            other_gradient = load_row(dy_second, dy_second_strides, token, columns, WIDTH)
            ahead = load_normed(dy, dy_strides, x, x_strides, stats, following, tokens, columns, WIDTH, CENTRED)
            after = tl.load(order + tl.minimum(position + 2, last))
            normed, d_normed, totals = norm_again(gradient, values, moments, factor, totals)
            _, other, other_totals = norm_again(other_gradient, values, moments, other_factor, other_totals)
            result = norm_gradient(normed, _added(d_normed, other), moments[1], WIDTH, CENTRED, LANES)
            store_row(dx, token, columns, result, WIDTH)
            token, following, position = following, after, position + 1
        four = totals[0], totals[1], other_totals[0], other_totals[1]
        store_sums(sums, four, None, None, None, None, offsets, row, rows, columns, WIDTH, CHUNK)
    store_zeros(dx, order, middle, end, columns, WIDTH)


@triton.jit
def _added(a, b):
    parts = ()
    for i in tl.static_range(len(a)):
        parts = parts + (a[i] + b[i],)
    return parts
