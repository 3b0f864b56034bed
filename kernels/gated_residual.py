"""gated_residual: a branch, times the token's row of the gate table, added to the residual stream."""

import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._gated_norm import gated_norm_backward as gated_norm_backward
from sora_fast.kernels._gated_norm import gated_norm_forward as gated_norm_forward
from sora_fast.kernels._launch import cdiv, launch
from sora_fast.kernels._rows import (
    CHUNK,
    RowBlock,
    Sums,
    fold,
    load_fp32,
    run_of,
    store_sums,
    store_zeros,
    strides,
    walk,
)


def gated_residual_forward(residual: Tensor, branch: Tensor, gate: Tensor | None, index: Tensor) -> Tensor:
    """The output [N, C]. Any strides."""
    tokens, width = residual.shape
    out = residual.new_empty(tokens, width)
    block = RowBlock.pointwise(width)
    launch(
        gated_residual_forward_kernel,
        (cdiv(tokens, block.tokens), cdiv(width, block.columns)),
        *(residual, branch, gate, index, out, tokens),
        *(residual.stride(), branch.stride(), strides(gate)),
        **{"WIDTH": width, "BLOCK_N": block.tokens, "BLOCK_C": block.columns},
        num_warps=block.num_warps,
    )
    return out


def gated_residual_backward(
    d_out: Tensor, branch: Tensor, gate: Tensor, index: Tensor, offsets: Tensor, order: Tensor, *, tables: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """d_residual, d_branch [N, C], and d_gate as [1, M, C] in the table's dtype.

    offsets [M+1], order [N]: the tokens sorted by row, with padding past offsets[M]. tables: False: [0, M, C] in place
    of d_gate, and the branch is not read.
    """
    tokens, width = branch.shape
    rows = offsets.shape[0] - 1
    # d_residual is d_out but for the padding, which may hold anything there and must be zero here.
    d_residual, d_branch = d_out.new_empty(tokens, width), branch.new_empty(tokens, width)
    sums = Sums.empty(gate, int(tables), rows, tokens)
    block = RowBlock.pointwise_backward(width)
    launch(
        gated_residual_backward_kernel,
        (cdiv(tokens, CHUNK), cdiv(width, block.columns)),
        *(d_out, branch, gate, index, offsets, order, d_residual, d_branch, sums, tokens, rows),
        *(d_out.stride(), branch.stride(), gate.stride()),
        **{"WIDTH": width, "BLOCK_C": block.columns, "CHUNK": CHUNK},
        num_warps=block.num_warps,
    )
    return d_residual, d_branch, fold(sums, offsets, gate)[0]


@triton.jit
def gated_residual_forward_kernel(
    residual,
    branch,
    gate,
    index,
    out,
    tokens,
    residual_strides,
    branch_strides,
    gate_strides,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    exists = token < tokens
    row = tl.load(index + token, mask=exists, other=-1)
    inside = column < WIDTH
    used = inside & (row >= 0)[:, None]
    result = load_fp32(residual, residual_strides, token[:, None], column, used)
    if gate is not None:
        factor = load_fp32(gate, gate_strides, row[:, None], column, used)
        result += factor * load_fp32(branch, branch_strides, token[:, None], column, used)
    else:
        result += load_fp32(branch, branch_strides, token[:, None], column, used)
    tl.store(out + token.to(tl.int64)[:, None] * WIDTH + column, result, mask=inside & exists[:, None])


@triton.jit
def gated_residual_backward_kernel(
    d_out, branch, gate, index, offsets, order, d_residual, d_branch, sums, tokens, rows,
    d_out_strides, branch_strides, gate_strides,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < WIDTH
    position, middle, end = walk(offsets, rows, tokens, CHUNK)
    while position < middle:
        token = tl.load(order + position)
        row, stop = run_of(index, offsets, token, position, middle)
        # The same for all tokens of the row; a load of it would wait behind the store of d_residual.
        factor = load_fp32(gate, gate_strides, row, column, inside)
        d_gate = tl.zeros([BLOCK_C], dtype=tl.float32)
        while position < stop:
            token = tl.load(order + position)
            gradient = load_fp32(d_out, d_out_strides, token, column, inside)
            if sums is not None:
                d_gate += gradient * load_fp32(branch, branch_strides, token, column, inside)
            written = token.to(tl.int64) * WIDTH + column
            tl.store(d_residual + written, gradient, mask=inside)
            tl.store(d_branch + written, gradient * factor, mask=inside)
            position += 1
        store_sums(sums, ((d_gate,),), None, None, None, None, offsets, row, rows, (column,), WIDTH, CHUNK)
    store_zeros(d_residual, order, middle, end, (column,), WIDTH)
    store_zeros(d_branch, order, middle, end, (column,), WIDTH)
