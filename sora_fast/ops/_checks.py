"""Checks of what the ops are given. Each message names the argument, what came, and what is right."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from sora_fast.packing import PackedLayout, RowIndex
from sora_fast.packing._bundle import TensorBundle, likeness
from sora_fast.packing._bundle import may_read as may_read

# What kernels compute with; the torch backend also takes fp64.
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)


# Kinds of arguments that pass a check once and for all; batches of other sizes are others.
_MOST = 4096


def once(check: Callable[..., None]) -> Callable[..., None]:
    """`check` of positional arguments, of which it reads shapes, dtypes and devices alone and no values, is not made
    again for arguments like those that passed it: it takes up to 12 µs of a call's 35.

    Like are tensors and bundles of tensors of the same of those, and other values that are equal, of one type.
    """
    passed: set[tuple[Any, ...]] = set()

    @wraps(check)
    def checked(*args: Any) -> None:
        key = None if torch.compiler.is_compiling() else _likeness(args)
        if key is not None and key in passed:
            return
        check(*args)
        if key is not None:
            if len(passed) >= _MOST:
                passed.clear()
            passed.add(key)

    return checked


_values: set[type] = set()
_INTEGERS = frozenset((int,))  # (1, 2, 2) equals (True, 2.0, 2), which is no patch


def value(kind: type) -> type:
    """For a class of values, hashed and compared by content: `once` may take them for alike."""
    _values.add(kind)
    return kind


def _likeness(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """None if there is an argument of a kind that it does not know."""
    key: list[Any] = []
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            key.append((arg.shape, arg.dtype, arg.device))
        elif arg is None or kind is str:
            key.append(arg)
        elif kind is float or kind is int or kind is bool:
            key.append((kind, arg))
        elif isinstance(arg, TensorBundle):
            key.append(likeness(arg))
        elif kind in _values or (kind is tuple and _INTEGERS.issuperset(map(type, arg))):
            key.append(arg)
        else:
            return None
    return tuple(key)


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
    """`tensor` is one, and has `shape`; a letter stands for any size. TypeError, ValueError."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__}; it must be a tensor {_written(shape)}")
    sizes = zip(tensor.shape, shape, strict=False)
    if tensor.ndim != len(shape) or any(isinstance(wanted, int) and size != wanted for size, wanted in sizes):
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; it must be {_written(shape)}")


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """The dtype is one of `allowed`. TypeError."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(allowed))
        raise TypeError(f"{name}: {str(tensor.dtype).removeprefix('torch.')}; it must be {wanted}")


def check_device(name: str, tensor: Tensor, other: str, device: torch.device) -> None:
    """The tensor is where `other` is. ValueError."""
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, but {other} is on {device}")


def check_index(index: Tensor | RowIndex, tokens: int, rows: int | None, device: torch.device) -> None:
    """The row of every token: [N] int32 or a RowIndex of M rows (None: of any). Its values are not read: that would
    wait."""
    if isinstance(index, RowIndex):
        if rows is not None and index.num_rows != rows:
            raise ValueError(f"index: a RowIndex of {index.num_rows} rows, but the modulation has {rows}")
        check_shape("index.tokens", index.tokens, [tokens])
        for name, part in (("index.offsets", index.offsets), ("index.tokens", index.tokens)):
            check_dtype(name, part, [torch.int32])
            check_device(name, part, "the first argument", device)
        index = index.index
    elif not isinstance(index, Tensor):
        raise TypeError(f"index: {type(index).__name__}; it must be an int32 tensor [{tokens}] or a RowIndex")
    check_shape("index", index, [tokens])
    check_dtype("index", index, [torch.int32])
    check_device("index", index, "the first argument", device)


def check_layout(layout: PackedLayout) -> None:
    """It is one. TypeError."""
    if not isinstance(layout, PackedLayout):
        raise TypeError(f"layout: {type(layout).__name__}; it must be a PackedLayout")


def check_eps(eps: float) -> None:
    """A positive number in fp32. TypeError, ValueError."""
    if not isinstance(eps, float | int | np.number):
        raise TypeError(f"eps: {type(eps).__name__}; it must be a number")
    if not eps >= torch.finfo(torch.float32).tiny:
        raise ValueError(f"eps: {eps}; it must be above 0 in fp32, or rows of equal values would divide by zero")


def _written(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"
