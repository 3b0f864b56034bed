"""What the tests of all ops share: the error rule, and scratch memory that shows who reads it unwritten."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# Absolute floor of the error rule, relative to the largest value: a few roundings in fp32, the least that any
# order of summation costs.
_FLOOR = 8 * torch.finfo(torch.float32).eps

# `EXAMPLES=25 make test`: every random search tries so many times as many.
_TIMES = int(os.environ.get("EXAMPLES", "1"))


def examples(count: int) -> settings:
    """For a test by hypothesis: how many examples it tries, in the default run."""
    return settings(max_examples=count * _TIMES)


def assert_within_rule(
    actual: Tensor, plain: Tensor, oracle: Tensor, *, name: str = "result", terms: float = 1.0
) -> None:
    """`actual` may be at most twice as far from the fp64 `oracle` as `plain` PyTorch in the same dtype, plus a floor.

    Errors are the largest absolute difference over the tensor. terms: size of what was added up, for the floor; give
    it where large terms cancel, which plain PyTorch may do exactly by luck. `actual` must also have the dtype and
    shape of `plain`.
    """
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, but plain PyTorch gives {plain.dtype}"
    assert actual.shape == plain.shape == oracle.shape, f"{name}: {actual.shape}, {plain.shape}, {oracle.shape}"
    if actual.numel() == 0:
        return
    exact = oracle.detach().cpu().double()
    assert torch.isfinite(exact).all(), f"{name}: the oracle is not finite"
    error = (actual.detach().cpu().double() - exact).abs().max().item()
    allowed = 2 * (plain.detach().cpu().double() - exact).abs().max().item()
    allowed += _FLOOR * max(terms, exact.abs().max().item())
    assert error <= allowed, f"{name}: error {error:.3e} against the fp64 oracle; the rule allows {allowed:.3e}"


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and its kind return with NaN (integers: their largest value), until undone.

    In a hypothesis test: `with pytest.MonkeyPatch.context() as monkeypatch: poison_empty(monkeypatch); ...`.
    """
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    return wrapper


def far_apart(x: Tensor, axis: int) -> Tensor:
    """`x` laid out anew, so that its last element along `axis` lies 2³¹ elements behind its first.

    On a CPU, memory that nobody touches is never taken; where that much cannot even be reserved, the test is skipped.
    """
    strides = list(torch.empty(x.shape[:axis] + x.shape[axis + 1 :]).stride())
    strides.insert(axis, -(-(1 << 31) // (x.shape[axis] - 1)))
    try:
        far = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
    except RuntimeError as error:
        pytest.skip(f"no room for strides past 32 bits: {error}")
    return far.copy_(x)
