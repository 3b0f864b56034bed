"""linear_unpatchify on one core, forward and backward, beside a product and a scatter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.ops import linear_unpatchify, unpatchify
from sora_fast.packing import PackedLayout, RaggedLatents

PATCH, CHANNELS, WIDTH = (1, 2, 2), 16, 384
GRIDS = [(8, 16, 16), (1, 32, 24), (4, 12, 20)]
LAYOUT = PackedLayout.from_grids(GRIDS, order="tiled")
LATENTS = RaggedLatents.empty([(CHANNELS, t, h * 2, w * 2) for t, h, w in GRIDS])


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_unpatchify(x, weight, bias, LAYOUT, PATCH, LATENTS).flat


def product_then_scatter(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return unpatchify(F.linear(x, weight, bias), LAYOUT, PATCH, LATENTS).flat


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("form", [fused, product_then_scatter], ids=["one op", "product then scatter"])
def test_linear_unpatchify(benchmark: Any, form: Callable[..., Tensor], compiled: bool) -> None:
    torch.manual_seed(0)
    shapes = ((LAYOUT.capacity, WIDTH), (4 * CHANNELS, WIDTH), (4 * CHANNELS,))
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    d_flat = torch.randn(LATENTS.flat.shape)
    run = torch.compile(form, fullgraph=True) if compiled else form

    def step() -> None:
        torch.autograd.grad(run(*tensors), tensors, d_flat)

    step()
    benchmark(step)
