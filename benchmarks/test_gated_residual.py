"""gated_residual on one core, forward and backward, beside its formula written out."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from benchmarks.cases import modulation_step
from sora_fast.ops import gated_residual
from sora_fast.packing import RowIndex


def written_out(residual: Tensor, branch: Tensor, gate: Tensor, rows: RowIndex) -> Tensor:
    """The baseline. Padding is beyond it."""
    return residual + gate[rows.index] * branch


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("op", [written_out, gated_residual])
def test_gated_residual(benchmark: Any, op: Callable[..., Tensor], compiled: bool) -> None:
    benchmark(modulation_step(gated_residual, op, compiled=compiled))
