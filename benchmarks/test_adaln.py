"""adaln on one core, forward and backward, beside DiT's formula written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import modulation_step
from sora_fast.ops import adaln
from sora_fast.packing import RowIndex


def written_out(x: Tensor, shift: Tensor, scale: Tensor, rows: RowIndex) -> Tensor:
    """The baseline. Padding is beyond it."""
    return F.layer_norm(x, x.shape[1:], eps=1e-6) * (1 + scale[rows.index]) + shift[rows.index]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("op", [written_out, adaln])
def test_adaln(benchmark: Any, op: Callable[..., Tensor], compiled: bool) -> None:
    benchmark(modulation_step(adaln, op, compiled=compiled))
