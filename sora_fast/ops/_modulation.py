"""What the ops that modulate tokens by rows of a table share: checks, and the gather in plain PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.ops._checks import (
    FLOAT_DTYPES,
    KERNEL_DTYPES,
    check_device,
    check_dtype,
    check_index,
    check_shape,
)
from sora_fast.packing import RowIndex

Index = Tensor | RowIndex

# A program of a kernel that norms rows holds a whole one. Twice as wide, the backward pass spills hundreds of bytes a
# thread, and four times, the forward pass would take more than the 32 warps that there are.
MAX_KERNEL_WIDTH = 8192


def check_modulated(tokens: dict[str, Tensor], tables: dict[str, Tensor | None], index: Index) -> None:
    """tokens: [N, C], all alike; tables: [M, C] in fp32 or the tokens' dtype, all alike, or None. By their names."""
    (first, x), *others = tokens.items()
    check_shape(first, x, ["N", "C"])
    check_dtype(first, x, FLOAT_DTYPES)
    for name, tensor in others:
        check_shape(name, tensor, x.shape)
        check_dtype(name, tensor, [x.dtype])
        check_device(name, tensor, first, x.device)
    if x.shape[1] == 0:
        raise ValueError(f"{first}: shape {tuple(x.shape)}; it must have at least one column")
    given = {name: tensor for name, tensor in tables.items() if tensor is not None}
    leader, table = next(iter(given.items()), ("", None))
    if table is not None:
        check_shape(leader, table, ["M", x.shape[1]])
        check_dtype(leader, table, [x.dtype, torch.float32])
        if table.shape[0] == 0:
            raise ValueError(f"{leader}: shape {tuple(table.shape)}; it must have at least one row")
    for name, tensor in given.items():
        check_shape(name, tensor, table.shape)
        check_dtype(name, tensor, [table.dtype])
        check_device(name, tensor, first, x.device)
    check_index(index, x.shape[0], None if table is None else table.shape[0], x.device)


def offered(x: Tensor) -> tuple[str, ...]:
    """The backends that take the dtype of `x`."""
    return ("torch", "triton") if x.dtype in KERNEL_DTYPES else ("torch",)


def offered_rows(x: Tensor) -> tuple[str, ...]:
    """The backends that take `x` [N, C], for the ops that norm its rows."""
    return offered(x) if x.shape[1] <= MAX_KERNEL_WIDTH else ("torch",)


def parts(index: Index) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(index, offsets, tokens): what custom ops take; without CSR form for a plain tensor."""
    # The kernels read them at stride 1; nothing is copied where they are so, as a RowIndex always is.
    if isinstance(index, RowIndex):
        return index.index.contiguous(), index.offsets.contiguous(), index.tokens.contiguous()
    return index.contiguous(), None, None


def csr(index: Tensor, offsets: Tensor | None, tokens: Tensor | None, num_rows: int | None) -> tuple[Tensor, Tensor]:
    """(offsets, tokens) as given, or, of so many rows, built on the device: a backward pass is what needs them."""
    if offsets is None or tokens is None:
        rows = RowIndex.from_index(index, num_rows)
        return rows.offsets, rows.tokens
    return offsets, tokens


def table_kind(*tables: Tensor | None) -> tuple[int | None, torch.dtype]:
    """Rows and dtype of tables that are alike; None and fp32 if none of them is given."""
    return next(((table.shape[0], table.dtype) for table in tables if table is not None), (None, torch.float32))


def by_rows(
    index: Tensor, offsets: Tensor | None, tokens: Tensor | None, num_rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(index, offsets, tokens) for a backward pass. Where no table has rows (None), and in no CSR form, all tokens are
    of one."""
    if num_rows is None and offsets is None:
        index, num_rows = index.clamp(max=0), 1
    return index, *csr(index, offsets, tokens, num_rows)


def table_gradients(grads: Tensor, asked: tuple[bool, ...], given: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """[sum(asked), M, C] as one gradient for each table that is given, None for the others. asked: of which there are
    any; with an affine norm those of a table that is not given, too."""
    found = iter(grads.unbind())
    gradients = [next(found) if wanted else None for wanted in asked]
    return tuple(gradient if there else None for gradient, there in zip(gradients, given, strict=True))


def fake_tables(x: Tensor, asked: tuple[bool, ...], offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """What `table_gradients` takes, of the tables of `x` [N, C]; offsets: [M+1]."""
    dtype = dtype if any(asked) else x.dtype
    return x.new_empty(sum(asked), offsets.shape[0] - 1, x.shape[1], dtype=dtype)


def without_padding(x: Tensor, index: Index) -> Tensor:
    """`x` [N, C] with zeros for padding, whatever stands there; in its gradient too."""
    return torch.where(_is_token(parts(index)[0]), x, 0)


def guarded(x: Tensor, index: Index) -> Tensor:
    """`x` [N, C] as it is, padding too, but with zeros for padding in its gradient, whatever arrives there.

    An op that takes padding out of its result alone needs no more. (A mask for every factor cost a compiled `adaln` up
    to 40% of its time on a CPU.)
    """
    return _Guarded.apply(x, parts(index)[0])


def gather_rows(table: Tensor, index: Index) -> Tensor:
    """table[index], [N, C], widened; padding gets some row or other, and gives nothing to the table's gradient."""
    return _GatherRows.apply(widened(table), *parts(index))


def widened(x: Tensor) -> Tensor:
    """In the dtype that plain PyTorch computes in: fp32, or fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def sum_rows(x: Tensor, index: Tensor, offsets: Tensor, tokens: Tensor) -> Tensor:
    """Sums [M, C] of the tokens `x` [N, C] of every row; padding is not read.

    index [N]: the row of every token, −1 for padding; offsets [M+1], tokens [N]: the same in CSR form.
    """
    return _SumRows.apply(x, index, offsets, tokens)


def _is_token(index: Tensor) -> Tensor:
    return (index >= 0)[:, None]


class _Guarded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return torch.where(_is_token(index), grad, 0), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, offsets: Tensor | None, tokens: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, offsets, tokens)
        ctx.num_rows = table.shape[0]
        return table[index]  # padding, −1: the last row

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, offsets, tokens = ctx.saved_tensors
        if grad.device.type == "cpu" and not (torch.compiler.is_compiling() and _on_one_core()):
            return _sums(grad, *csr(index, offsets, tokens, ctx.num_rows)), None, None, None
        sums = grad.new_zeros(ctx.num_rows, grad.shape[1])
        own = torch.where(_is_token(index), grad, 0)
        return sums.index_put((index,), own, accumulate=True), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, offsets: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return _sums(x, offsets, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        # Padding's −1 is the last row: zeros, without a mask.
        return F.pad(grad, (0, 0, 0, 1))[index], None, None, None


def _sums(x: Tensor, offsets: Tensor, tokens: Tensor) -> Tensor:
    """As `sum_rows`, fast on a CPU, and the same bits in every run.

    PyTorch's own sum by index adds token after token, and by atomics in what Inductor makes of it: measured 5× slower,
    and other bits in every run on two threads. A bag of embeddings is the same sum, and its kernel runs at memory
    speed, but it adds token after token too: so bags of `_CHUNK` first, and then their sums, in fp64.
    """
    total = tokens.shape[0]
    ends = F.pad(offsets, (0, 1), value=total)  # the last bag is the padding's
    if total <= _CHUNK:
        return _bags(x, tokens, ends)[:-1]
    cuts = torch.cat([ends, torch.arange(0, total, _CHUNK, dtype=ends.dtype, device=ends.device)]).sort().values
    partial = _bags(x, tokens, cuts).double()
    order = torch.arange(partial.shape[0], dtype=tokens.dtype, device=tokens.device)
    return _bags(partial, order, torch.searchsorted(cuts, ends, out_int32=True))[:-1].to(x.dtype)


def _bags(x: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    return F.embedding_bag(tokens, x, ends, mode="sum", include_last_offset=True)


# Tokens in one partial sum, as in the kernels. 115k tokens of 0.1 in one row: 6e-4 off if added in a line, 3e-7 so, and
# 6e-7 with 64.
_CHUNK = 32


def _on_one_core() -> bool:
    """There Inductor's own sum by index is the faster one, and adds in one order: it needs no atomics, and is one loop
    with what comes before it."""
    return torch.get_num_threads() == 1


# Dynamo cannot trace it; see `choose` for why this and not the decorator.
_on_one_core._dynamo_marked_constant = True  # type: ignore[attr-defined]
