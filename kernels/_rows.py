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

# ruff: noqa: RUF005 (Triton adds tuples and does not unpack them)

from dataclasses import dataclass
from functools import cached_property, lru_cache
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

# A thread's registers in the backward passes on whole rows: 16 warps on a multiprocessor, two rows of 3072 columns at a
# time, four of 1536. Left to itself the assembler takes 169 for the triple op, and one row fits; or it spills 8 to 24
# bytes to fit one row more.
MOST_REGISTERS = 128


def split_width(width: int) -> tuple[int, int]:
    """Powers of two that cover `width` together; the second is 0 if the first does alone.

    What is covered and not there costs registers and instructions. adaln forward on sm_90 issued 1,348 instructions a
    token and scheduler for 5120 columns as 8192, and issues 776 as 4096 + 1024; at 90% of an H200's copy rate a token
    has 1,230 cycles.
    """
    whole = next_power_of_two(width)
    main = whole // 2
    # No less than an eighth: every thread holds 8 columns of the main part, and one of the rest at the least.
    rest = max(next_power_of_two(max(width - main, 1)), main // 8)
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

    @cached_property
    def meta(self) -> dict[str, int]:
        """The constants of a kernel on whole rows."""
        lanes = max(1, min(32 * self.num_warps, self.columns // 8))
        return {"MAIN": self.columns, "REST": self.rest, "LANES": lanes, "num_warps": self.num_warps}

    @staticmethod
    @lru_cache
    def forward(width: int) -> "RowBlock":
        """A whole row, since LayerNorm needs it."""
        columns, rest = split_width(width)
        # 16 elements a thread and what the rest adds: two 16-byte loads a tensor in bf16, with half of the addresses
        # and of a reduction's steps that 8 take (776 instructions a token and scheduler for 5120 columns, not 1,052).
        # adaln on sm_90 has 4 rows of 5120 columns on a multiprocessor (56 registers), 8 of 3072, 18 of 1152: 40 to 48
        # KB of x on their way.
        return RowBlock(1, columns, num_warps=max(1, columns // 512), rest=rest)

    @staticmethod
    @lru_cache
    def backward(width: int) -> "RowBlock":
        """One token after the other, the sums of its row in registers."""
        columns, rest = split_width(width)
        # 8 elements a thread, a 16-byte load in bf16, and what the rest adds; 16 where a row has 8192.
        return RowBlock(1, columns, num_warps=min(16, max(1, columns // 256)), rest=rest)

    @staticmethod
    @lru_cache
    def pointwise(width: int) -> "RowBlock":
        """Parts of rows, for ops that need no sum over a row."""
        columns = _fitting_columns(width)
        return RowBlock(1024 // columns, columns, num_warps=4)

    @staticmethod
    @lru_cache
    def pointwise_backward(width: int) -> "RowBlock":
        """One token after the other, for such ops."""
        columns = _fitting_columns(width)
        # 8 elements a thread, here too.
        return RowBlock(1, columns, num_warps=max(1, columns // 256))


def _fitting_columns(width: int) -> int:
    """The largest power of two up to 1024 whose multiples cover `width` with an eighth to spare at the most; or 128.

    1152 columns in blocks of 1024 are two blocks a token, the second nearly empty; in five of 256, a tenth is.
    """
    sizes = (1024, 512, 256, 128)
    return next(
        (size for size in sizes if 8 * cdiv(width, size) * size <= 9 * width), min(128, next_power_of_two(width))
    )


def strides(table: Tensor | None) -> tuple[int, ...] | None:
    """Of a table that may not be there."""
    return None if table is None else table.stride()


@triton.jit
def load_fp32(pointer, strides, row, column, mask):
    """Elements (row, column) of a strided matrix; zero where `mask` is false, whatever stands there."""
    # 64 bits: a token times the stride of a fused projection passes 2³¹ at 100k tokens.
    pointer += row.to(tl.int64) * strides[0]
    return tl.load(pointer + column.to(tl.int64) * strides[1], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_columns(MAIN: tl.constexpr, REST: tl.constexpr):
    """The columns of a row, in one part [MAIN] or in two, [MAIN] and [REST]. Whatever a program holds of a row is such
    a tuple: a tensor a part."""
    columns = (tl.arange(0, MAIN),)
    if REST > 0:
        columns = columns + (MAIN + tl.arange(0, REST),)
    return columns


@triton.jit
def load_row(matrix, strides, row, columns, WIDTH: tl.constexpr, real=None):
    """A row of a strided matrix as it is stored, or some rows [n, 1]; zeros where not `real` [n, 1]. Nothing if the
    matrix is None."""
    parts = ()
    if matrix is not None:
        pointer = matrix + row.to(tl.int64) * strides[0]
        for i in tl.static_range(len(columns)):
            mask = columns[i] < WIDTH
            if real is not None:
                mask = mask & real
            parts = parts + (tl.load(pointer + columns[i].to(tl.int64) * strides[1], mask=mask, other=0.0),)
    return parts


@triton.jit
def load_vector(vector, columns, WIDTH: tl.constexpr):
    """A norm's weight or bias, contiguous; nothing if it is None."""
    parts = ()
    if vector is not None:
        for i in tl.static_range(len(columns)):
            parts = parts + (tl.load(vector + columns[i], mask=columns[i] < WIDTH, other=0.0),)
    return parts


@triton.jit
def store_row(matrix, row, columns, parts, WIDTH: tl.constexpr, real=None):
    """Store a row of a contiguous matrix, or some rows [n, 1]; not those that are not `real` [n, 1]."""
    pointer = matrix + row.to(tl.int64) * WIDTH
    for i in tl.static_range(len(columns)):
        mask = columns[i] < WIDTH
        if real is not None:
            mask = mask & real
        tl.store(pointer + columns[i], parts[i], mask=mask)


@triton.jit
def _lane_sums(x, LANES: tl.constexpr):
    """Of columns [c] or rows [n, c]: sums [LANES] or [n, LANES], of those that a thread holds in bf16 and fp16."""
    AXIS: tl.constexpr = len(x.shape) - 1
    COLUMNS: tl.constexpr = x.shape[AXIS]
    VECTOR: tl.constexpr = min(8, COLUMNS // LANES)
    if AXIS == 0:
        x = tl.reshape(x, [COLUMNS // (LANES * VECTOR), LANES, VECTOR])
    else:
        x = tl.reshape(x, [x.shape[0], COLUMNS // (LANES * VECTOR), LANES, VECTOR])
    return tl.sum(tl.sum(x, axis=AXIS + 2), axis=AXIS)


@triton.jit
def _row_sums(rows, LANES: tl.constexpr):
    """The sum over a row, its parts together."""
    total = _lane_sums(rows[0], LANES)
    for i in tl.static_range(1, len(rows)):
        total += _lane_sums(rows[i], LANES)
    return tl.sum(total, axis=0)


@triton.jit
def norm_rows(
    x, columns, stats, token, tokens,
    WIDTH: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Normed rows of x [n, c], LayerNorm or (not CENTRED) RMSNorm; columns outside must be zero and stay so.

    stats: [2, N] or, if not CENTRED, [1, N]: 1/std, and the mean, are stored there for the backward pass.
    """
    if CENTRED:
        mean = _row_sums(x, LANES) / WIDTH
        tl.store(stats + tokens + token, mean)
        # Centred before squaring: E[x²] − E[x]² loses everything when the mean is large.
        centred = ()
        for i in tl.static_range(len(columns)):
            centred = centred + (tl.where(columns[i] < WIDTH, x[i] - mean, 0.0),)
        x = centred
    squares = ()
    for i in tl.static_range(len(columns)):
        squares = squares + (x[i] * x[i],)
    rstd = tl.rsqrt(_row_sums(squares, LANES) / WIDTH + EPS)
    tl.store(stats + token, rstd)
    normed = ()
    for i in tl.static_range(len(columns)):
        normed = normed + (x[i] * rstd,)
    return normed


@triton.jit
def widened(rows):
    """In fp32."""
    parts = ()
    for i in tl.static_range(len(rows)):
        parts = parts + (rows[i].to(tl.float32),)
    return parts


@triton.jit
def only_used(rows, used):
    """Rows [n, c] in fp32, with zeros for those not `used` [n, 1], whatever they hold."""
    parts = ()
    for i in tl.static_range(len(rows)):
        parts = parts + (tl.where(used, rows[i].to(tl.float32), 0.0),)
    return parts


@triton.jit
def modulate(normed, weight, bias, shift, scale, used):
    """(normed · weight + bias) · (1 + scale) + shift; zeros where not `used` [n, 1], if shift is zero there.

    weight, bias, shift, scale: (), where there is none.
    """
    rows = ()
    for i in tl.static_range(len(normed)):
        row = normed[i]
        if len(weight) > 0:
            row *= weight[i].to(tl.float32)
        if len(bias) > 0:
            row += tl.where(used, bias[i].to(tl.float32), 0.0)
        if len(scale) > 0:
            row *= 1.0 + scale[i].to(tl.float32)
        if len(shift) > 0:
            row += shift[i].to(tl.float32)
        rows = rows + (row,)
    return rows


@triton.jit
def load_normed(
    dy, dy_strides, x, x_strides, stats, token, tokens, columns, WIDTH: tl.constexpr, CENTRED: tl.constexpr
):  # fmt: skip
    """Of a token that was normed, what `norm_again` needs: dy, x, and (mean, 1/std) as `norm_rows` stored them."""
    mean = tl.full([], 0.0, tl.float32)
    if CENTRED:
        mean = tl.load(stats + tokens + token)
    gradient, values = load_row(dy, dy_strides, token, columns, WIDTH), load_row(x, x_strides, token, columns, WIDTH)
    return gradient, values, (mean, tl.load(stats + token))


@triton.jit
def load_factor(scale, scale_strides, weight, row, columns, WIDTH: tl.constexpr):
    """What a normed row is multiplied by, (1 + scale) · weight: the same for all tokens of a table's row. Nothing if
    there is neither."""
    scales, weights = load_row(scale, scale_strides, row, columns, WIDTH), load_vector(weight, columns, WIDTH)
    factor = ()
    if len(scales) > 0:
        for i in tl.static_range(len(columns)):
            part = 1.0 + scales[i].to(tl.float32)
            if len(weights) > 0:
                part *= weights[i].to(tl.float32)
            factor = factor + (part,)
    elif len(weights) > 0:
        factor = widened(weights)
    return factor


@triton.jit
def norm_again(dy, x, stats, factor, sums):
    """Of a token, from what `norm_rows` and `modulate` took: its normed row, the gradient of that, and `sums`, of dy
    and of dy · normed, with its own added. stats: its mean and 1/std. factor: of `load_factor`. A sum that is () stays
    so: nobody asks for it."""
    normed, d_normed, shift, scale = (), (), (), ()
    for i in tl.static_range(len(x)):
        gradient = dy[i].to(tl.float32)
        part = (x[i].to(tl.float32) - stats[0]) * stats[1]
        normed = normed + (part,)
        d_normed = d_normed + (gradient * factor[i] if len(factor) > 0 else gradient,)
        if len(sums[0]) > 0:
            shift = shift + (sums[0][i] + gradient,)
        if len(sums[1]) > 0:
            scale = scale + (sums[1][i] + gradient * part,)
    return normed, d_normed, (shift, scale)


@triton.jit
def norm_gradient(normed, d_normed, rstd, WIDTH: tl.constexpr, CENTRED: tl.constexpr, LANES: tl.constexpr):
    """Gradient of a row from that of its normed form."""
    totals = _norm_totals(normed[0], d_normed[0], CENTRED, LANES)
    for i in tl.static_range(1, len(normed)):
        totals += _norm_totals(normed[i], d_normed[i], CENTRED, LANES)
    # All in one reduction: one round through shared memory, with its three barriers, not one a sum and a part.
    totals = tl.sum(totals, axis=0) / WIDTH
    if CENTRED:
        along_mean, along_normed = tl.split(totals)
    else:
        along_mean, along_normed = 0.0, totals
    gradient = ()
    for i in tl.static_range(len(normed)):
        gradient = gradient + (rstd * (d_normed[i] - along_mean - normed[i] * along_normed),)
    return gradient


@triton.jit
def _norm_totals(normed, d_normed, CENTRED: tl.constexpr, LANES: tl.constexpr):
    along_normed = _lane_sums(d_normed * normed, LANES)
    if CENTRED:
        return tl.join(_lane_sums(d_normed, LANES), along_normed)
    else:
        return along_normed


@triton.jit
def walk(offsets, rows, tokens, CHUNK: tl.constexpr):
    """This program's places in the order of tokens: [begin, middle) are tokens of rows, [middle, end) is padding."""
    begin = tl.program_id(0) * CHUNK
    end = tl.minimum(begin + CHUNK, tokens)
    middle = tl.minimum(tl.maximum(begin, tl.load(offsets + rows)), end)
    return begin, middle, end


@triton.jit
def run_of(index, offsets, token, position, middle):
    """The row of the token at `position`, and where its tokens end in this program's walk."""
    row = tl.load(index + token)
    # Past `position` whatever the offsets say: nobody checks them, and the walk must come to its end.
    return row, tl.maximum(position + 1, tl.minimum(middle, tl.load(offsets + row + 1)))


@triton.jit
def store_zeros(matrix, order, begin, end, columns, WIDTH: tl.constexpr):
    """Zero the rows order[begin:end] of a contiguous matrix: the gradient of padding."""
    for position in range(begin, end):
        store_row(matrix, tl.load(order + position), columns, zero_row(columns), WIDTH)


@triton.jit
def zero_row(columns, ASKED: tl.constexpr = True):
    """Zeros in fp32; nothing if nobody asks for what they would add up."""
    parts = ()
    if ASKED:
        for i in tl.static_range(len(columns)):
            parts = parts + (tl.zeros(columns[i].shape, tl.float32),)
    return parts


class Sums(NamedTuple):
    """Where the sums over the tokens of a row go.

    tables: [tables, M, C], gradients of the op's tables, of those that are asked for; if it has an affine norm, those
        of its shift and scale come last, and are both there.
    parts: [2 · chunks, tables, C] fp32, slots of the rows that no single chunk holds.
    terms: [M, 2, C] fp32, of which the gradients of the norm's weight and bias are the sums; [0, 2, C] if it has none.
    """

    tables: Tensor
    parts: Tensor
    terms: Tensor

    @staticmethod
    def empty(
        x: Tensor, count: int, rows: int, tokens: int, *, dtype: torch.dtype | None = None, affine: bool = False
    ) -> "Sums | None":
        """Over so many tokens, for `count` tables of so many rows, as wide as `x` [.., C] and where it is; None for no
        table. dtype: the tables'; None: that of x. affine: the norm has a weight or a bias."""
        if not count:
            return None
        width = x.shape[1]
        return Sums(
            x.new_empty(count, rows, width, dtype=dtype),
            x.new_empty(2 * cdiv(tokens, CHUNK), count, width, dtype=torch.float32),
            x.new_empty(rows * affine, 2, width, dtype=torch.float32),
        )


@triton.jit
def store_sums(
    sums, values, scale, scale_strides, weight, bias, offsets, row, rows, columns,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store what this chunk has added up for a row: `values`, a row a table, () for one that nobody asks for. sums
    None: for all of them.

    scale, weight, bias: of the norm whose tables come last, if the op has one; each may be None.
    """
    if sums is not None:
        values = _asked(values)
        TABLES: tl.constexpr = len(values)
        chunk = tl.program_id(0)
        begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
        if _is_cut(begin, end, CHUNK):
            slot = 2 * chunk + (begin >= chunk * CHUNK)
            for table in tl.static_range(TABLES):
                store_row(sums.parts, slot * TABLES + table, columns, values[table], WIDTH)
        else:
            for table in tl.static_range(TABLES):
                for i in tl.static_range(len(columns)):
                    value = values[table][i]
                    if table == TABLES - 1 and (weight is not None or bias is not None):
                        shift = values[table - 1][i]
                        value = _scale_sum(
                            sums, shift, value, scale, scale_strides, weight, bias, row, columns[i], WIDTH
                        )
                    _store_table(sums, table, row, rows, columns[i], columns[i] < WIDTH, value, WIDTH)


@triton.jit
def _asked(rows):
    """Those of a tuple of rows that are not ()."""
    found = ()
    for i in tl.static_range(len(rows)):
        if len(rows[i]) > 0:
            found = found + (rows[i],)
    return found


@triton.jit
def _is_cut(begin, end, CHUNK: tl.constexpr):
    """True if tokens begin … end of a row lie in more chunks than one. (Of no tokens: false.)"""
    return (end > begin) & (begin // CHUNK != (end - 1) // CHUNK)


@triton.jit
def _scale_sum(sums, shift, total, scale, scale_strides, weight, bias, row, column, WIDTH: tl.constexpr):
    """The gradient of a row's scale from Σ dy, `shift`, and Σ dy · normed, `total`. Stores the row's terms."""
    inside = column < WIDTH
    factor = 1.0
    if scale is not None:
        factor += load_fp32(scale, scale_strides, row, column, inside)
    place = sums.terms + row.to(tl.int64) * 2 * WIDTH + column
    tl.store(place, factor * total, mask=inside)
    tl.store(place + WIDTH, factor * shift, mask=inside)
    if weight is not None:
        total *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32) * shift
    return total


@triton.jit
def _store_table(sums, table, row, rows, column, mask, value, WIDTH: tl.constexpr):
    offset = (tl.cast(table, tl.int64) * rows + row) * WIDTH
    tl.store(sums.tables + offset + column, value, mask=mask)


def fold(
    sums: Sums | None,
    offsets: Tensor,
    x: Tensor,
    *,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Finish what the chunks have left: the gradients of the tables, [tables, M, C], zeros for rows without a token.

    scale, weight, bias: of a norm. The gradients of the last two, [2, C] fp32, come second; [0, C] if it has neither.
    sums None, which nobody asked for: [0, M, C] and [0, C], where `x` [N, C] is.
    """
    if sums is None:
        return x.new_empty(0, offsets.shape[0] - 1, x.shape[1]), x.new_empty(0, x.shape[1], dtype=torch.float32)
    tables, rows, width = sums.tables.shape
    # 256 groups of rows are programs enough. Where rows are many, few of them are cut, and a program that finds none in
    # a group of 128 is soon done.
    group = min(128, next_power_of_two(cdiv(rows, 256)))
    # 32 slots of 64 columns at a time, 16 elements a thread: a row's slots may be hundreds, and the programs of a
    # table with few rows are few, so each must keep many bytes in flight.
    grid = (cdiv(rows, group), cdiv(width, 64), tables)
    meta = {"WIDTH": width, "CHUNK": CHUNK, "ROWS": group, "BLOCK_S": 32, "BLOCK_C": 64, "num_warps": 4}
    launch(fold_rows_kernel, grid, offsets, sums, scale, strides(scale), weight, bias, rows, **meta)
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
