"""gated_residual_adaln: the gate of one branch and the norm of the next, in a single pass over memory."""

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


def gated_residual_adaln_forward(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
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
    launch(
        gated_residual_adaln_forward_kernel,
        (tokens,),
        *(residual, branch, gate, shift, scale, weight, bias, index, h, y, stats, tokens),
        *(residual.stride(), branch.stride(), strides(gate), strides(shift), strides(scale)),
        **{"WIDTH": width, "EPS": eps, "CENTRED": centred},
        **RowBlock.forward(width).meta,
    )
    return h, y, stats


def gated_residual_adaln_backward(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    index: Tensor,
    offsets: Tensor,
    order: Tensor,
    *,
    centred: bool,
    asked: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """d_residual and d_branch [N, C], d_gate, d_shift and d_scale as [3, M, C] in `dtype`, and d_weight and d_bias as
    [2, C] fp32.

    dh: None where nothing but the norm uses h. gate: None: both gradients of tokens are one, and d_branch None. offsets
    [M+1], order [N]: the tokens sorted by row, with padding past offsets[M]. asked: whether anybody wants d_gate, for
    which alone the branch is read, d_shift, and d_scale; of the two of an affine norm both or none. What is not wanted
    is not there: [2, M, C], and so on. Without weight and bias, or if neither of the two is asked for, [0, C] in place
    of their gradients.
    """
    tokens, width = h.shape
    rows = offsets.shape[0] - 1
    d_residual = h.new_empty(tokens, width)
    d_branch = None if gate is None else h.new_empty(tokens, width)
    affine = not (weight is None and bias is None)
    sums = Sums.empty(h, sum(asked), rows, tokens, dtype=dtype, affine=affine and asked[2])
    block = RowBlock.backward(width)
    # An affine norm needs a few addresses more than 128 registers hold where a thread has 12 columns, and so do the
    # rows that one warp holds (up to 72 bytes on sm_80 and sm_100); 16 warps have no more.
    roomy = (affine or block.num_warps == 1) and block.num_warps < 16
    launch(
        gated_residual_adaln_backward_kernel,
        (cdiv(tokens, CHUNK),),
        *(dh, dy, h, branch, gate, scale, weight, bias, stats, index, offsets, order),
        *(d_residual, d_branch, sums, tokens, rows),
        *((dy if dh is None else dh).stride(), dy.stride(), h.stride()),
        *(strides(branch), strides(gate), strides(scale)),
        **{"WIDTH": width, "CENTRED": centred, "CHUNK": CHUNK, "maxnreg": 168 if roomy else MOST_REGISTERS},
        **dict(zip(("GATE", "SHIFT", "SCALE"), asked, strict=True)),
        **block.meta,
    )
    norm = {"scale": scale, "weight": weight, "bias": bias} if asked[2] else {}
    return d_residual, d_branch, *fold(sums, offsets, h, **norm)


@triton.jit
def gated_residual_adaln_forward_kernel(
    residual, branch, gate, shift, scale, weight, bias, index, h, y, stats, tokens,
    residual_strides, branch_strides, gate_strides, shift_strides, scale_strides,
    WIDTH: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    columns = row_columns(MAIN, REST)
    token = tl.program_id(0)
    # As in adaln: nothing but the tables waits for the index, and no load for a sum.
    row = tl.load(index + token)
    streams = load_row(residual, residual_strides, token, columns, WIDTH)
    branches = load_row(branch, branch_strides, token, columns, WIDTH)
    used = row >= 0
    gates = load_row(gate, gate_strides, row, columns, WIDTH, used)
    scales = load_row(scale, scale_strides, row, columns, WIDTH, used)
    shifts = load_row(shift, shift_strides, row, columns, WIDTH, used)
    weights, biases = load_vector(weight, columns, WIDTH), load_vector(bias, columns, WIDTH)
    total = _gated(only_used(streams, used), only_used(branches, used), gates, h)
    store_row(h, token, columns, total, WIDTH)
    normed = norm_rows(only_used(total, used), columns, stats, token, tokens, WIDTH, EPS, CENTRED, LANES)
    store_row(y, token, columns, modulate(normed, weights, biases, shifts, scales, used), WIDTH)


@triton.jit
def _gated(streams, branches, gates, h):
    """streams + branches · gates (no gates: ()), as h will hold them: the norm, and the backward pass, see no other."""
    total = ()
    for i in tl.static_range(len(streams)):
        branch = branches[i]
        if len(gates) > 0:
            branch *= gates[i].to(tl.float32)
        total = total + ((streams[i] + branch).to(h.dtype.element_ty),)
    return total


@triton.jit
def gated_residual_adaln_backward_kernel(
    dh, dy, h, branch, gate, scale, weight, bias, stats, index, offsets, order,
    d_residual, d_branch, sums, tokens, rows,
    dh_strides, dy_strides, h_strides, branch_strides, gate_strides, scale_strides,
    WIDTH: tl.constexpr, CENTRED: tl.constexpr, CHUNK: tl.constexpr,
    GATE: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    columns = row_columns(MAIN, REST)
    begin, middle, end = walk(offsets, rows, tokens, CHUNK)
    position, last = begin, end - 1
    token, following = tl.load(order + begin), tl.load(order + tl.minimum(begin + 1, last))
    ahead = load_normed(dy, dy_strides, h, h_strides, stats, token, tokens, columns, WIDTH, CENTRED)
    while position < middle:
        row, stop = run_of(index, offsets, token, position, middle)
        factor = load_factor(scale, scale_strides, weight, row, columns, WIDTH)
        gates = load_row(gate, gate_strides, row, columns, WIDTH)
        totals, d_gate = (zero_row(columns, SHIFT), zero_row(columns, SCALE)), zero_row(columns, GATE)
        while position < stop:
            gradient, values, moments = ahead
            # What comes after the reduction is on its way before it, and what the next token needs before that. (dh and
            # branch a token ahead too would spill 32 bytes of 128 registers where a thread has 12 columns.)
            others, branches = (), ()
            if dh is not None:
                others = load_row(dh, dh_strides, token, columns, WIDTH)
            if GATE:
                branches = load_row(branch, branch_strides, token, columns, WIDTH)
            ahead = load_normed(dy, dy_strides, h, h_strides, stats, following, tokens, columns, WIDTH, CENTRED)
            after = tl.load(order + tl.minimum(position + 2, last))
            normed, d_normed, totals = norm_again(gradient, values, moments, factor, totals)
            d_h = norm_gradient(normed, d_normed, moments[1], WIDTH, CENTRED, LANES)
            d_h, d_out, d_gate = _gradients(d_h, others, branches, gates, d_gate)
            store_row(d_residual, token, columns, d_h, WIDTH)
            if d_branch is not None:
                store_row(d_branch, token, columns, d_out, WIDTH)
            token, following, position = following, after, position + 1
        values = d_gate, totals[0], totals[1]
        if SCALE:
            store_sums(sums, values, scale, scale_strides, weight, bias, offsets, row, rows, columns, WIDTH, CHUNK)
        else:  # the gate's, and perhaps the shift's: the norm's vectors have no part in them
            store_sums(sums, values, None, None, None, None, offsets, row, rows, columns, WIDTH, CHUNK)
    store_zeros(d_residual, order, middle, end, columns, WIDTH)
    if d_branch is not None:
        store_zeros(d_branch, order, middle, end, columns, WIDTH)


@triton.jit
def _gradients(d_h, others, branches, gates, d_gate):
    """A token's gradients of residual and branch, and `d_gate` with what it adds to the gate's.

    d_h: the gradient of h through its norm; others: that of h from elsewhere, or (). branches, d_gate: (), where nobody
    asks for the gate's. gates: (), where there are none: the branch's gradient, (), is the residual's.
    """
    d_residual, d_branch, d_gates = (), (), ()
    for i in tl.static_range(len(d_h)):
        total = d_h[i]
        if len(others) > 0:
            total += others[i].to(tl.float32)
        if len(branches) > 0:
            d_gates = d_gates + (d_gate[i] + total * branches[i].to(tl.float32),)
        d_residual = d_residual + (total,)
        if len(gates) > 0:
            d_branch = d_branch + (total * gates[i].to(tl.float32),)
    return d_residual, d_branch, d_gates
