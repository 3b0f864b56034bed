"""gated_residual_adaln on one core, forward and backward, beside the two ops that it joins and their formulas."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from benchmarks import test_adaln, test_gated_residual
from benchmarks.cases import modulation_step
from sora_fast.ops import adaln, gated_residual, gated_residual_adaln
from sora_fast.packing import RowIndex


def one_after_the_other(
    add: Callable[..., Tensor], norm: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(
        residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, rows: RowIndex
    ) -> tuple[Tensor, Tensor]:
        h = add(residual, branch, gate, rows)
        return h, norm(h, shift, scale, rows)

    return run


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "op",
    [
        pytest.param(one_after_the_other(test_gated_residual.written_out, test_adaln.written_out), id="written_out"),
        pytest.param(one_after_the_other(gated_residual, adaln), id="two ops"),
        gated_residual_adaln,
    ],
)
def test_gated_residual_adaln(benchmark: Any, op: Callable[..., Any], compiled: bool) -> None:
    benchmark(modulation_step(gated_residual_adaln, op, compiled=compiled))
