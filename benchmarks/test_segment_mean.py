"""segment_mean on one core, forward and backward, beside a mean for each segment."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_fast.ops import segment_mean
from sora_fast.packing import PackedLayout

LAYOUT = PackedLayout.from_grids([(8, 16, 16), (1, 32, 24), *[(1, 1, 77)] * 8])
WIDTH = 384


def packed(x: Tensor) -> Tensor:
    return segment_mean(x, LAYOUT)


def one_by_one(x: Tensor) -> Tensor:
    return torch.stack([part.mean(dim=0) for part in x.split(LAYOUT.cu_seqlens.diff().tolist())])


@pytest.mark.parametrize("mean", [one_by_one, packed])
def test_segment_mean(benchmark: Any, mean: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(LAYOUT.capacity, WIDTH, requires_grad=True)
    d_means = torch.randn(LAYOUT.max_segments, WIDTH)
    benchmark(lambda: torch.autograd.grad(mean(x), x, d_means))
