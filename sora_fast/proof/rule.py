"""The error rule, and scratch memory that shows who reads it unwritten."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

# Absolute floor of the error rule, relative to the largest value: a few roundings in fp32, the least that any
# order of summation costs.
_FLOOR = 8 * torch.finfo(torch.float32).eps


def error_and_limit(actual: Tensor, plain: Tensor, oracle: Tensor, *, terms: float = 1.0) -> tuple[float, float]:
    """How far `actual` is from the fp64 `oracle`, and how far it may be: twice as far as `plain` PyTorch in the same
    dtype, plus a floor. Integers must be the same.

    Errors are the largest absolute difference over the tensor, NaN if it holds one. terms: size of what was added up,
    for the floor; give it where large terms cancel, which plain PyTorch may do exactly by luck. ValueError if `actual`
    has not the dtype and shape of `plain`, or the oracle is not finite.
    """
    if actual.dtype != plain.dtype:
        raise ValueError(f"{actual.dtype}, but plain PyTorch gives {plain.dtype}")
    if not actual.shape == plain.shape == oracle.shape:
        raise ValueError(f"shape {tuple(actual.shape)}, but {tuple(plain.shape)} and {tuple(oracle.shape)} are right")
    if actual.numel() == 0:
        return 0.0, 0.0
    exact = oracle.detach().cpu().double()
    if not torch.isfinite(exact).all():
        raise ValueError("the oracle is not finite")
    error = (actual.detach().cpu().double() - exact).abs().max().item()
    if not actual.dtype.is_floating_point:
        return error, 0.0
    limit = 2 * (plain.detach().cpu().double() - exact).abs().max().item()
    return error, limit + _FLOOR * max(terms, exact.abs().max().item())


@contextmanager
def poisoned_scratch() -> Iterator[None]:
    """Inside, what `torch.empty` and its kind return is filled with NaN (integers: their largest value)."""
    with (
        patch.multiple(torch, **_poisoned(torch, "empty", "empty_like", "empty_strided")),
        patch.multiple(torch.Tensor, **_poisoned(torch.Tensor, "new_empty", "new_empty_strided")),
    ):
        yield


def _poisoned(owner: Any, *names: str) -> dict[str, Callable[..., Tensor]]:
    return {name: _filled(getattr(owner, name)) for name in names}


def _filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    return wrapper
