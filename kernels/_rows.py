"""What the row-wise kernels share: norms in registers, and the ordered reduction of tokens into rows.

The reduction: a backward kernel walks the tokens sorted by row (the CSR form of the index) in chunks of CHUNK and sums
in fp32 while the row stays the same. A row whose tokens all lie in one chunk is finished there and then: a table with a
row a token costs its own size, and no more. Of a row that goes on in other chunks, every chunk stores its part in a
slot, and `fold` adds the slots in a fixed order. A chunk cuts two such rows at the most, the one that it begins inside
of and the one that it ends inside of, so two slots a chunk are enough for every batch. Nothing depends on the number of
multiprocessors, and there are no atomics: the order is the same on every GPU, and the bits in every run.

The gradients of the norm's weight and bias need no sum over tokens of their own. All that tokens of a row share can
stand before the sum, so from a row's A = Σ dy and B = Σ dy · normed, which are d_shift and d_scale of a norm without
affine, follow d_scale = weight · B + bias · A, and d_weight and d_bias as the sums of (1 + scale) · B and
(1 + scale) · A over the rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels import _fold
from sora_fast.kernels._launch import cdiv, launch, next_power_of_two

# Tokens a program walks. 32: 16k tokens make 512 programs, enough for 132 multiprocessors, and the parts of sums of
# three tables, written once and read once, add 6% to the traffic of the widest op.
CHUNK = 32


def split_width(width: int) -> tuple[int, int]:
    """Powers of two that cover `width` together; the second is 0 if the first does alone.

    What is covered and not there costs registers: of the triple op's backward pass on sm_90, in which a thread has 8
    columns and those of the rest, five programs of 1152 columns fit a multiprocessor (96 registers, 128 threads); of
    2048 columns it was two (105 registers, 256 threads). 1536: four and two; 3072: two and one. At 5120 a thread has
    10 columns (98 registers) in place of 16 (128).
    """
    whole = next_power_of_two(width)
    main = whole // 2
    rest = next_power_of_two(max(width - main, 1))
    # Below 64 columns there is nothing to save.
    return (main, rest) if rest < main and main >= 64 else (whole, 0)


@dataclass(frozen=True)
class RowBlock:
    """What one program holds: `tokens` × `columns` elements, and how many warps hold them.

    rest: columns past those, for kernels that split a row; a power of two, or 0.
    """

    tokens: int
    columns: int
    num_warps: int
    rest: int = 0

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
        columns, rest = split_width(width)
        # 8 elements a thread, a 16-byte load in bf16, and what the rest adds; 16 where a row has 8192, since the 64
        # registers that 32 warps leave a thread do not hold three fp32 sums and five tensors, and the 128 of 16 nearly
        # do: past 7,000 columns the triple op spills up to 48 bytes with LayerNorm, a weight and a bias, and up to 192
        # at odd widths. (8 to 24 bytes elsewhere, as of adaln's with a weight and a bias at 1024 on sm_90, are the
        # assembler's choice, to fit one program more on a multiprocessor. maxnreg=255 takes them away and up to 72
        # registers more everywhere.)
        return RowBlock(1, columns, num_warps=min(16, max(1, columns // 256)), rest=rest)

    @staticmethod
    def pointwise(width: int) -> "RowBlock":
        """Parts of rows, for ops that need no sum over a row."""
        columns = min(1024, next_power_of_two(width))
        return RowBlock(1024 // columns, columns, num_warps=4)

    @staticmethod
    def pointwise_backward(width: int) -> "RowBlock":
        """One token after the other, for such ops."""
        columns = min(1024, next_power_of_two(width))
        # 8 elements a thread, here too.
        return RowBlock(1, columns, num_warps=max(1, columns // 256))


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
def load_stats(stats, token, tokens, CENTRED: tl.constexpr):
    """Mean (0 if not CENTRED) and 1/std of a row, as `norm_rows` stored them."""
    mean = tl.load(stats + tokens + token) if CENTRED else 0.0
    return mean, tl.load(stats + token)


@triton.jit
def read_row(
    dy, dy_strides, x, x_strides, scale, scale_strides, weight, mean, rstd, token, row, column, sums,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Some columns of a token that was normed and modulated: their normed form again, the gradient of that, and
    `sums`, of dy and of dy · normed, with theirs added.
    """
    inside = column < WIDTH
    gradient = load_fp32(dy, dy_strides, token, column, inside)
    normed = (load_fp32(x, x_strides, token, column, inside) - mean) * rstd
    d_normed = gradient * (1.0 + load_fp32(scale, scale_strides, row, column, inside))
    if weight is not None:
        d_normed *= load_vector(weight, column, inside)
    return normed, d_normed, (sums[0] + gradient, sums[1] + gradient * normed)


@triton.jit
def norm_totals(normed, d_normed, CENTRED: tl.constexpr):
    """What `norm_gradient` needs of all columns, to be added up over their parts."""
    along_normed = d_normed * normed
    # Both sums in one reduction: one round through shared memory, not two.
    return tl.sum(tl.join(d_normed, along_normed), axis=0) if CENTRED else tl.sum(along_normed, axis=0)


@triton.jit
def norm_gradient(normed, d_normed, rstd, totals, WIDTH: tl.constexpr, CENTRED: tl.constexpr):
    """Gradient of some columns of a row from that of their normed form."""
    if CENTRED:
        along_mean, along_normed = tl.split(totals / WIDTH)
        d_normed -= along_mean
    else:
        along_normed = totals / WIDTH
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


class Sums(NamedTuple):
    """Where the sums over the tokens of a row go.

    tables: [tables, M, C], gradients of the op's tables; if it has a norm, those of its shift and scale come last.
    parts: [2 · chunks, tables, C] fp32, slots of the rows that no single chunk holds.
    terms: [M, 2, C] fp32, of which the gradients of the norm's weight and bias are the sums; [0, 2, C] if it has none.
    """

    tables: Tensor
    parts: Tensor
    terms: Tensor

    @staticmethod
    def empty(table: Tensor, count: int, tokens: int, *, affine: bool = False) -> "Sums":
        """Of `tokens` tokens, for `count` tables like `table` [M, C]. affine: the norm has a weight or a bias."""
        rows, width = table.shape
        return Sums(
            table.new_empty(count, rows, width),
            table.new_empty(2 * cdiv(tokens, CHUNK), count, width, dtype=torch.float32),
            table.new_empty(rows * affine, 2, width, dtype=torch.float32),
        )


@triton.jit
def zero_sums(COLUMNS: tl.constexpr):
    """Of dy and of dy · normed."""
    return tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)


@triton.jit
def store_sums(
    sums, values, scale, scale_strides, weight, bias, offsets, row, rows, column,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store what this chunk has added up for a row: `values`, one a table. sums None: nobody asked for it.

    scale, weight, bias: of the norm whose tables come last, if the op has one.
    """
    if sums is not None:
        TABLES: tl.constexpr = len(values)
        chunk = tl.program_id(0)
        begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
        inside = column < WIDTH
        if _is_cut(begin, end, CHUNK):
            slot = 2 * chunk + (begin >= chunk * CHUNK)
            for table in tl.static_range(TABLES):
                place = sums.parts + (slot * TABLES + table).to(tl.int64) * WIDTH + column
                tl.store(place, values[table], mask=inside)
        else:
            for table in tl.static_range(TABLES):
                value = values[table]
                if table == TABLES - 1 and (weight is not None or bias is not None):
                    shift = values[table - 1]
                    value = _scale_sum(sums, shift, value, scale, scale_strides, weight, bias, row, column, WIDTH)
                _store_table(sums, table, row, rows, column, inside, value, WIDTH)


@triton.jit
def _is_cut(begin, end, CHUNK: tl.constexpr):
    """True if tokens begin … end of a row lie in more chunks than one. (Of no tokens: false.)"""
    return (end > begin) & (begin // CHUNK != (end - 1) // CHUNK)


@triton.jit
def _scale_sum(sums, shift, total, scale, scale_strides, weight, bias, row, column, WIDTH: tl.constexpr):
    """The gradient of a row's scale from Σ dy, `shift`, and Σ dy · normed, `total`. Stores the row's terms."""
    inside = column < WIDTH
    factor = 1.0 + load_fp32(scale, scale_strides, row, column, inside)
    place = sums.terms + row.to(tl.int64) * 2 * WIDTH + column
    tl.store(place, factor * total, mask=inside)
    tl.store(place + WIDTH, factor * shift, mask=inside)
    if weight is not None:
        total *= load_vector(weight, column, inside)
    if bias is not None:
        total += load_vector(bias, column, inside) * shift
    return total


@triton.jit
def _store_table(sums, table, row, rows, column, mask, value, WIDTH: tl.constexpr):
    offset = (tl.cast(table, tl.int64) * rows + row) * WIDTH
    tl.store(sums.tables + offset + column, value, mask=mask)


def fold(
    sums: Sums | None,
    offsets: Tensor,
    table: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Finish what the chunks have left: the tables' gradients, [tables, M, C] in the dtype of `table`, zeros for rows
    without a token.

    weight, bias: of a norm, whose scale `table` must then be. Their gradients, [2, C] fp32, come second; else [0, C].
    sums None, which nobody asked for: [0, M, C] and [0, C].
    """
    if sums is None:
        return table.new_empty(0, *table.shape), table.new_empty(0, table.shape[1], dtype=torch.float32)
    tables, rows, width = sums.tables.shape
    # 256 groups of rows are programs enough. Where rows are many, few of them are cut, and a program that finds none in
    # a group of 128 is soon done.
    group = min(128, next_power_of_two(cdiv(rows, 256)))
    # 32 slots of 64 columns at a time, 16 elements a thread: a row's slots may be hundreds, and the programs of a
    # table with few rows are few, so each must keep many bytes in flight.
    grid = (cdiv(rows, group), cdiv(width, 64), tables)
    meta = {"WIDTH": width, "CHUNK": CHUNK, "ROWS": group, "BLOCK_S": 32, "BLOCK_C": 64, "num_warps": 4}
    launch(fold_rows_kernel, grid, offsets, sums, table, table.stride(), weight, bias, rows, **meta)
    return sums.tables, _fold.fold(sums.terms) if len(sums.terms) else sums.terms[:, 0]


@triton.jit
def fold_rows_kernel(
    offsets, sums, scale, scale_strides, weight, bias, rows,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    AFFINE: tl.constexpr = weight is not None or bias is not None
    table, tables = tl.program_id(2), tl.num_programs(2)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.load(offsets + row, mask=row < rows, other=0)
    end = tl.load(offsets + row + 1, mask=row < rows, other=0)
    _clear(sums, row, rows, (row < rows) & (begin == end), table, tables, column, WIDTH, AFFINE)
    cut = _is_cut(begin, end, CHUNK)
    current = tl.min(tl.where(cut, row, rows))
    while current < rows:
        first, stop = tl.load(offsets + current), tl.load(offsets + current + 1)
        total = _sum_slots(sums, table, tables, first, stop, column, WIDTH, CHUNK, BLOCK_S, BLOCK_C)
        if AFFINE and table == tables - 1:
            shift = _sum_slots(sums, table - 1, tables, first, stop, column, WIDTH, CHUNK, BLOCK_S, BLOCK_C)
            total = _scale_sum(sums, shift, total, scale, scale_strides, weight, bias, current, column, WIDTH)
        _store_table(sums, table, current, rows, column, column < WIDTH, total, WIDTH)
        current = tl.min(tl.where(cut & (row > current), row, rows))


@triton.jit
def _clear(sums, row, rows, empty, table, tables, column, WIDTH: tl.constexpr, AFFINE: tl.constexpr):
    """Zero the rows that no token uses."""
    row, column = row[:, None], column[None, :]
    mask = empty[:, None] & (column < WIDTH)
    zeros = tl.zeros(mask.shape, tl.float32)
    _store_table(sums, table, row, rows, column, mask, zeros, WIDTH)
    if AFFINE and table == tables - 1:
        place = sums.terms + row.to(tl.int64) * 2 * WIDTH + column
        tl.store(place, zeros, mask=mask)
        tl.store(place + WIDTH, zeros, mask=mask)


@triton.jit
def _sum_slots(
    sums, table, tables, begin, end, column,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sum of the slots of a row's tokens begin … end, one for each of their chunks, for one table."""
    first, last = begin // CHUNK, tl.cdiv(end, CHUNK)
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    for start in range(first, last, BLOCK_S):
        chunk = start + tl.arange(0, BLOCK_S)
        slot = 2 * chunk + (begin >= chunk * CHUNK)
        offset = (slot * tables + table).to(tl.int64)[:, None] * WIDTH + column[None, :]
        total += tl.load(sums.parts + offset, mask=(chunk < last)[:, None] & (column < WIDTH)[None, :], other=0.0)
    return tl.sum(total, axis=0)
