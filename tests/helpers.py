"""What the tests of all ops share: the error rule as an assertion, how long to search, memory far apart."""

import os

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from sora_fast.proof.rule import error_and_limit

# `EXAMPLES=25 make test`: every random search tries so many times as many.
_TIMES = int(os.environ.get("EXAMPLES", "1"))


def examples(count: int) -> settings:
    """For a test by hypothesis: how many examples it tries, in the default run."""
    return settings(max_examples=count * _TIMES)


def assert_within_rule(
    actual: Tensor, plain: Tensor, oracle: Tensor, *, name: str = "result", terms: float = 1.0
) -> None:
    """`actual` may be at most twice as far from the fp64 `oracle` as `plain` PyTorch in the same dtype, plus a floor.

    See `error_and_limit`, which also says what `terms` is. `actual` must have the dtype and shape of `plain`.
    """
    try:
        error, allowed = error_and_limit(actual, plain, oracle, terms=terms)
    except ValueError as difference:
        raise AssertionError(f"{name}: {difference}") from difference
    assert error <= allowed, f"{name}: error {error:.3e} against the fp64 oracle; the rule allows {allowed:.3e}"


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
