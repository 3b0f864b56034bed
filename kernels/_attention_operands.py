"""How the attention kernels hold the tensors that they multiply: rows in memory, blocks of them on chip.

A tensor [N, H, D] walks through the kernels' files like this. `packed_attention` makes `Rows` of it (`Head.rows`) and,
where blocks are read whole, descriptors (`Head.descriptors`); `_attention_config` says how many rows a block has;
`_attention_walk` at which token a block starts, and which of its rows exist; `load_block` here brings them on chip, in
two parts where the head dim is no power of two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import jit
from triton.tools.tensor_descriptor import TensorDescriptor

from sora_fast.kernels._launch import next_power_of_two

# Rows of the largest block that a launch configuration may ask for.
_LONGEST_BLOCK = 128


class Rows(NamedTuple):
    """A tensor [N, H, D] of any strides, for a kernel; made by `Head.rows`."""

    data: Any
    token_stride: Any
    head_stride: Any
    dim_stride: Any


class Block(NamedTuple):
    """Columns of some rows of one head: the first `Head.main`, and the rest (never used where that is 0).

    Of values on chip, of fp32 sums, or of the descriptors that load them (None where there are none). What a function
    returns or a loop carries has no None in it, which Triton 3.6 cannot take.
    """

    main: Any
    rest: Any


@dataclass(frozen=True)
class Head:
    """How the kernels read a head's rows; a compile-time constant.

    main, rest: powers of two, at least 16, that cover the head dim `dim` together; rest is 0 if main does alone.
    group: neighbouring query heads that share a head of keys and values.
    unit: strides of tokens and heads are passed in units of so many elements. Triton knows of an integer only whether
        16 divides it: passed as it is, a head stride of 72 would cost the 16-byte loads.
    wide: a block's rows lie 2³¹ elements or more apart. (Else 32 bits within a block save the registers that make the
        difference between spilling and not on sm_80. Blocks start at 64-bit offsets in any case.)
    precision: of float32 products, as `tl.dot` calls it.
    """

    dim: int
    main: int
    rest: int
    group: int
    unit: int
    wide: bool
    precision: str

    @staticmethod
    def of(q: Tensor, k: Tensor, *others: Tensor) -> "Head":
        """For queries, keys and all others that a kernel touches: [N, H, D] of any strides."""
        strides = tuple([x.stride() for x in (q, k, *others)])  # of a generator it takes twice as long
        _, heads, dim = q.shape
        return _head(dim, heads // k.shape[1], strides, _dot_precision(q.dtype))

    def rows(self, x: Tensor) -> Rows:
        """x [N, H, D] as a kernel takes it."""
        token, head, dim = x.stride()
        return Rows(x, token // self.unit, head // self.unit, dim)

    def descriptors(self, tensors: Sequence[Tensor], rows: int, *, wanted: bool) -> list[TensorDescriptor | None]:
        """Main and rest of each of `tensors` [N, H, D], in blocks of `rows` rows; of None unless `wanted`.

        They must be `describable`. (Triton takes descriptors one by one only, not in tuples.)
        """
        if not wanted:
            return [None, None] * len(tensors)
        widths = (self.main, self.rest)
        return [_descriptor(x, rows, width) if width else None for x in tensors for width in widths]


@lru_cache
def _head(dim: int, group: int, strides: tuple[tuple[int, ...], ...], precision: str) -> Head:
    unit = 8 if all(stride % 8 == 0 for token, head, _ in strides for stride in (token, head)) else 1
    reach = max(_LONGEST_BLOCK * token + dim * channel for token, _, channel in strides)
    return Head(dim, *split_head_dim(dim), group, unit, reach >= 1 << 31, precision)


def _descriptor(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Like one that Triton has checked, which takes it 3 µs; an address is all that differs."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(_checked_descriptor(tuple(x.shape), x.stride(), x.dtype, rows, width), base=x)
    return made


@lru_cache
def _checked_descriptor(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, rows: int, width: int
) -> dict[str, Any]:
    (n, h, d), (token, head, _) = shape, strides
    base = torch.empty(0, dtype=dtype, device="meta")
    return vars(TensorDescriptor(base, [h, n, d], [head, token, 1], [1, rows, width]))


def describable(arch: tuple[int, int], *tensors: Tensor) -> bool:
    """True if the tensor memory accelerator of `arch` can read all of `tensors` [N, H, D].

    It is Hopper's; 16-byte addresses and strides, and rows in one piece, are what cuTensorMapEncodeTiled asks for.
    """
    if arch[0] < 9:
        return False
    for x in tensors:  # all() of a generator takes longer
        if x.element_size() != 2 or x.data_ptr() % 16 or not x.numel() or not _are_describable(x.stride()):
            return False
    return True


@lru_cache
def _are_describable(strides: tuple[int, ...]) -> bool:
    token, head, dim = strides
    return dim == 1 and all(0 < stride < 1 << 39 and stride % 8 == 0 for stride in (token, head))


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """`Head.main` and `Head.rest`: 72 = 64 + 16 (8 of them masked) takes 80 columns, the next power of two 128.

    So are 40 and 48 (32 + 16), 80 (64 + 16), 88 and 96 (64 + 32), 136 and 144 (128 + 16), 152 and 160 (128 + 32), 168
    to 192 (128 + 64). For 56, 104 to 120 and 200 to 248 the rest would be as wide as the main part: one block of 64,
    128, 256. (A third part, 112 columns for 104, would be one more load and product of each.)
    """
    whole = max(next_power_of_two(head_dim), 16)
    main = max(whole // 2, 16)
    rest = max(next_power_of_two(head_dim - main), 16)
    return (main, rest) if rest < main < head_dim else (whole, 0)


def _dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: exactly, unless the user lets PyTorch use TF32."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@jit
def _pointers(x, token, head, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """[ROWS, WIDTH]: to the columns from FIRST on of the rows from `token` on."""
    start = x.data + (token.to(tl.int64) * x.token_stride + head.to(tl.int64) * x.head_stride) * HEAD.unit
    rows = tl.arange(0, ROWS)
    cols = FIRST + tl.arange(0, WIDTH)
    if HEAD.wide:
        rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    return start + (rows * x.token_stride * HEAD.unit)[:, None] + (cols * x.dim_stride)[None, :]


@jit
def _columns(FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    return (FIRST + tl.arange(0, WIDTH) < HEAD.dim)[None, :]


@jit
def _within(exists, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    """Mask of the rows and columns that exist. exists: which rows do."""
    mask = exists[:, None]
    if HEAD.dim < FIRST + WIDTH:
        mask = mask & _columns(FIRST, WIDTH, HEAD)
    return mask


@jit
def _load(x, token, head, exists, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr):
    pointers = _pointers(x, token, head, FIRST, WIDTH, ROWS, HEAD)
    if exists is not None:
        block = tl.load(pointers, mask=_within(exists, FIRST, WIDTH, HEAD), other=0.0)
    elif HEAD.dim < FIRST + WIDTH:
        block = tl.load(pointers, mask=_columns(FIRST, WIDTH, HEAD), other=0.0)
    else:
        block = tl.load(pointers)
    return block


@jit
def load_block(x, token, head, exists, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """Rows of one head from `token` on; zeros where a row does not exist (0 · NaN is NaN). exists: None: all do."""
    main = _load(x, token, head, exists, 0, HEAD.main, ROWS, HEAD)
    rest = _load(x, token, head, exists, HEAD.main, HEAD.rest, ROWS, HEAD) if HEAD.rest else main
    return Block(main, rest)


@jit
def load_next(x, descriptors, token, head, exists, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """As `load_block`, by `descriptors` where there are any.

    They know the end of the tensor, not that of a segment, behind which NaN may stand: what does not exist is cleared
    on chip.
    """
    if descriptors.main is not None:
        MAIN: tl.constexpr = HEAD.main
        REST: tl.constexpr = HEAD.rest
        main = descriptors.main.load([head, token, 0]).reshape([ROWS, MAIN])
        rest = descriptors.rest.load([head, token, MAIN]).reshape([ROWS, REST]) if HEAD.rest else main
        if exists is not None:
            main = tl.where(exists[:, None], main, 0.0)
            rest = tl.where(exists[:, None], rest, 0.0) if HEAD.rest else main
        block = Block(main, rest)
    else:
        block = load_block(x, token, head, exists, ROWS, HEAD)
    return block


@jit
def store_block(x, token, head, exists, block, HEAD: tl.constexpr):
    """Store the rows of `block` that exist from `token` on."""
    ROWS: tl.constexpr = block.main.shape[0]
    pointers = _pointers(x, token, head, 0, HEAD.main, ROWS, HEAD)
    tl.store(pointers, block.main.to(x.data.dtype.element_ty), mask=_within(exists, 0, HEAD.main, HEAD))
    if HEAD.rest:
        pointers = _pointers(x, token, head, HEAD.main, HEAD.rest, ROWS, HEAD)
        tl.store(pointers, block.rest.to(x.data.dtype.element_ty), mask=_within(exists, HEAD.main, HEAD.rest, HEAD))


@jit
def add_block(x, token, head, exists, block, HEAD: tl.constexpr):
    """Add `block` to what stands there, by atomics: in no fixed order. exists: as for `load_block`."""
    _add(x, token, head, exists, block.main, 0, HEAD)
    if HEAD.rest:
        _add(x, token, head, exists, block.rest, HEAD.main, HEAD)


@jit
def _add(x, token, head, exists, values, FIRST: tl.constexpr, HEAD: tl.constexpr):
    ROWS: tl.constexpr = values.shape[0]
    WIDTH: tl.constexpr = values.shape[1]
    pointers = _pointers(x, token, head, FIRST, WIDTH, ROWS, HEAD)
    if exists is not None:
        tl.atomic_add(pointers, values, mask=_within(exists, FIRST, WIDTH, HEAD), sem="relaxed")
    elif HEAD.dim < FIRST + WIDTH:
        tl.atomic_add(pointers, values, mask=_columns(FIRST, WIDTH, HEAD), sem="relaxed")
    else:
        tl.atomic_add(pointers, values, sem="relaxed")


@jit
def load_numbers(data, place, exists, other):
    """One number a row; `other` where a row does not exist; exists None: all do."""
    return tl.load(data + place) if exists is None else tl.load(data + place, mask=exists, other=other)


@jit
def zero_block(ROWS: tl.constexpr, HEAD: tl.constexpr):
    """Sums that start at 0. A rest that is not used costs nothing."""
    MAIN: tl.constexpr = HEAD.main
    REST: tl.constexpr = HEAD.rest if HEAD.rest else 16
    return Block(tl.zeros([ROWS, MAIN], tl.float32), tl.zeros([ROWS, REST], tl.float32))


@jit
def scaled(block, factor, HEAD: tl.constexpr):
    """`block` times a number, or one a row ([rows, 1])."""
    return Block(block.main * factor, block.rest * factor if HEAD.rest else block.rest)


@jit
def products(a, b, HEAD: tl.constexpr):
    """a bᵀ: the scalar products of the rows of two blocks, fp32 [rows of a, rows of b]."""
    sums = tl.dot(a.main, tl.trans(b.main), input_precision=HEAD.precision)
    if HEAD.rest:
        sums = tl.dot(a.rest, tl.trans(b.rest), sums, input_precision=HEAD.precision)
    return sums


@jit
def add_products(sums, weights, block, HEAD: tl.constexpr):
    """sums + weights · block: rows of a block, weighted."""
    main = tl.dot(weights, block.main, sums.main, input_precision=HEAD.precision)
    rest = sums.rest
    if HEAD.rest:
        rest = tl.dot(weights, block.rest, rest, input_precision=HEAD.precision)
    return Block(main, rest)


@jit
def row_products(a, b, HEAD: tl.constexpr):
    """rowsum(a · b), fp32 [rows]."""
    sums = tl.sum(a.main.to(tl.float32) * b.main.to(tl.float32), 1)
    if HEAD.rest:
        sums += tl.sum(a.rest.to(tl.float32) * b.rest.to(tl.float32), 1)
    return sums
