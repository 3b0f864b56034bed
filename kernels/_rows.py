"""What the row-wise kernels share: norms in registers, and the ordered reduction of tokens into rows.

The reduction: a backward kernel walks the tokens sorted by row (the CSR form of the index) in chunks of CHUNK and sums
in fp32 while the row stays the same. Whenever the row or the chunk ends it stores what it has in a slot of its own;
then `fold` adds the slots of a row in a fixed order. From one (chunk, row) pair of the walk to the next, the chunk or
the row grows, so chunk + row numbers the pairs without a gap to compute on the host, and ⌈N / CHUNK⌉ + M slots are
enough for every batch. Nothing depends on the number of multiprocessors, and there are no atomics: the bits are the
same on every GPU and in every run.

The gradients of the norm's weight and bias need no sum over tokens of their own. All that tokens of a row share can
stand before the sum, so from a row's A = Σ dy and B = Σ dy · normed, which are d_shift and d_scale of a norm without
affine, follow d_scale = weight · B + bias · A, and d_weight and d_bias as the sums of (1 + scale) · B and
(1 + scale) · A over the rows: `fold` makes them all.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels import _fold
from sora_fast.kernels._launch import launch, next_power_of_two

# Tokens a program walks. 32: 16k tokens make 512 programs, enough for 132 multiprocessors, and the partial sums of
# three tables, written once and read once, add 6% to the traffic of the widest op.
CHUNK = 32


@dataclass(frozen=True)
class RowBlock:
    """What one program holds: `tokens` × `columns` elements, and how many warps hold them."""

    tokens: int
    columns: int
    num_warps: int

    @staticmethod
    def forward(width: int) -> "RowBlock":
        """Whole rows, since LayerNorm needs them; of 8,192 elements at the most."""
        columns = next_power_of_two(width)
        # At least 1024 elements, so that narrow rows do not make programs of a few cycles.
        tokens = max(1, 1024 // columns)
        # 16 elements a thread: two 16-byte loads a tensor in bf16, and far from spilling with five tensors alive.
        return RowBlock(tokens, columns, num_warps=max(1, tokens * columns // 512))

    @staticmethod
    def backward(width: int) -> "RowBlock":
        """One token after the other, the sums of its row in registers."""
        columns = next_power_of_two(width)
        # 8 elements a thread, a 16-byte load in bf16; 16 where a row has 8192, since the 64 registers that 32 warps
        # leave a thread do not hold three fp32 sums and five tensors, and the 128 of 16 warps do.
        return RowBlock(1, columns, num_warps=min(16, max(1, columns // 256)))

    @staticmethod
    def pointwise(width: int) -> "RowBlock":
        """Parts of rows, for ops that need no sum over a row."""
        columns = min(1024, next_power_of_two(width))
        return RowBlock(1024 // columns, columns, num_warps=4)


@triton.jit
def load_fp32(pointer, strides, row, column, mask):
    """Elements (row, column) of a strided matrix; zero where `mask` is false, whatever stands there."""
    # 64 bits: a token times the stride of a fused projection passes 2³¹ at 100k tokens.
    pointer += row.to(tl.int64) * strides[0]
    return tl.load(pointer + column.to(tl.int64) * strides[1], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_vector(pointer, column, mask):
    """Elements `column` of a norm's weight or bias, contiguous; zero where `mask` is false."""
    return tl.load(pointer + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def norm_rows(x, inside, stats, token, tokens, WIDTH: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr):
    """Normed rows of x [tokens, columns], LayerNorm or (not CENTRED) RMSNorm; columns outside must be zero and stay so.

    stats: [2, N] or, if not CENTRED, [1, N]: 1/std, and the mean, are stored there for `normed_again`.
    """
    exists = token < tokens
    if CENTRED:
        mean = tl.sum(x, axis=1) / WIDTH
        tl.store(stats + tokens + token, mean, mask=exists)
        # Centred before squaring: E[x²] − E[x]² loses everything when the mean is large.
        x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + EPS)
    tl.store(stats + token, rstd, mask=exists)
    return x * rstd[:, None]


@triton.jit
def normed_again(x, stats, token, tokens, CENTRED: tl.constexpr):
    """One row x in its normed form, and its 1/std, from what `norm_rows` stored."""
    rstd = tl.load(stats + token)
    if CENTRED:
        x -= tl.load(stats + tokens + token)
    return x * rstd, rstd


@triton.jit
def norm_backward(d_normed, normed, rstd, WIDTH: tl.constexpr, CENTRED: tl.constexpr):
    """Gradient of one row x from that of its normed form."""
    if CENTRED:
        # Both sums in one reduction: one round through shared memory, not two.
        sums = tl.sum(tl.join(d_normed, d_normed * normed), axis=0) / WIDTH
        along_mean, along_normed = tl.split(sums)
        d_normed -= along_mean
    else:
        along_normed = tl.sum(d_normed * normed, axis=0) / WIDTH
    return rstd * (d_normed - normed * along_normed)


@triton.jit
def walk(offsets, rows, tokens, CHUNK: tl.constexpr):
    """This program's places in the order of tokens: [begin, middle) are tokens of rows, [middle, end) is padding."""
    begin = tl.program_id(0) * CHUNK
    end = tl.minimum(begin + CHUNK, tokens)
    middle = tl.minimum(tl.maximum(begin, tl.load(offsets + rows)), end)
    return begin, middle, end


@triton.jit
def store_zeros(matrix, order, begin, end, column, WIDTH: tl.constexpr):
    """Zero the rows order[begin:end] of a contiguous matrix: the gradient of padding."""
    for position in range(begin, end):
        row = tl.load(order + position).to(tl.int64)
        tl.store(matrix + row * WIDTH + column, tl.zeros_like(column), mask=column < WIDTH)


@triton.jit
def store_partial(partials, slot, table, column, value, WIDTH: tl.constexpr, TABLES: tl.constexpr):
    """Store the sum of a (chunk, row) pair for one of the op's tables. partials None: nobody asked for it."""
    if partials is not None:
        partials += (slot * TABLES + table).to(tl.int64) * WIDTH
        tl.store(partials + column, value, mask=column < WIDTH)


def empty_partials(tokens: int, rows: int, tables: int, like: Tensor) -> Tensor:
    """Room for the partial sums [slots, tables, C], fp32."""
    slots = triton.cdiv(tokens, CHUNK) + rows
    return torch.empty(slots, tables, like.shape[1], dtype=torch.float32, device=like.device)


def fold(
    partials: Tensor | None,
    offsets: Tensor,
    table: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the slots of every row: [tables, M, C] in the dtype of `table`; zeros for rows without a token.

    weight, bias: of a norm, whose scale `table` must then be, and whose shift and scale must be the last two tables.
    Their gradients, [2, C] fp32, come second; else [0, C]. partials None, which nobody asked for: [0, M, C] and [0, C].
    """
    if partials is None:
        return table.new_empty(0, *table.shape), table.new_empty(0, table.shape[1], dtype=torch.float32)
    rows, (_, tables, width) = offsets.shape[0] - 1, partials.shape
    sums = table.new_empty(tables, rows, width)
    terms = None if weight is None and bias is None else partials.new_empty(rows, 2, width)
    # 32 slots of 64 columns at a time, 16 elements a thread: a row's slots may be hundreds, and the programs of a
    # table with few rows are few, so each must keep many bytes in flight.
    grid = (rows, triton.cdiv(width, 64), tables)
    meta = {"WIDTH": width, "CHUNK": CHUNK, "BLOCK_S": 32, "BLOCK_C": 64, "num_warps": 4}
    launch(_fold_rows, grid, partials, offsets, table, weight, bias, sums, terms, rows, table.stride(), **meta)
    return sums, partials.new_empty(0, width) if terms is None else _fold.fold(terms)


@triton.jit
def _fold_rows(
    partials,
    offsets,
    scale,
    weight,
    bias,
    sums,
    terms,
    rows,
    scale_strides,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, table, tables = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < WIDTH
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    # The chunks that the row's tokens lie in; none, if it has no tokens.
    first = begin // CHUNK
    last = tl.where(end > begin, tl.cdiv(end, CHUNK), first)
    total = _sum_slots(partials, row, table, tables, first, last, column, WIDTH, BLOCK_S, BLOCK_C)
    if terms is not None and table == tables - 1:
        shift = _sum_slots(partials, row, table - 1, tables, first, last, column, WIDTH, BLOCK_S, BLOCK_C)
        # A row that no token uses may hold anything.
        factor = 1.0 + load_fp32(scale, scale_strides, row, column, inside & (end > begin))
        place = terms + row.to(tl.int64) * 2 * WIDTH + column
        tl.store(place, factor * total, mask=inside)
        tl.store(place + WIDTH, factor * shift, mask=inside)
        if weight is not None:
            total *= load_vector(weight, column, inside)
        if bias is not None:
            total += load_vector(bias, column, inside) * shift
    offset = (table * rows + row).to(tl.int64) * WIDTH + column
    tl.store(sums + offset, total, mask=inside)


@triton.jit
def _sum_slots(
    partials,
    row,
    table,
    tables,
    first,
    last,
    column,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of a row's slots, one for each of the chunks [first, last), for one table."""
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    for start in range(first, last, BLOCK_S):
        chunk = start + tl.arange(0, BLOCK_S)
        offset = ((chunk + row) * tables + table).to(tl.int64)[:, None] * WIDTH + column[None, :]
        total += tl.load(partials + offset, mask=(chunk < last)[:, None] & (column < WIDTH)[None, :], other=0.0)
    return tl.sum(total, axis=0)
