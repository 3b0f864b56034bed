"""mlp_activation on one core, forward and backward, beside what PyTorch has for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.ops import mlp_activation

SHAPE = (1024, 1536)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=1)
    return F.silu(gate) * value


def ours(activation: str) -> Callable[[Tensor], Tensor]:
    return lambda x: mlp_activation(x, None, activation)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("group", "activate"),
    [("gelu", gelu), ("gelu", ours("gelu")), ("swiglu", swiglu), ("swiglu", ours("swiglu"))],
    ids=["gelu, PyTorch", "gelu, ours", "swiglu, PyTorch", "swiglu, ours"],
)
def test_mlp_activation(benchmark: Any, group: str, activate: Callable[[Tensor], Tensor], compiled: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(SHAPE, requires_grad=True)
    run = torch.compile(activate, fullgraph=True) if compiled else activate
    d_out = torch.randn(run(x).shape)

    def step() -> None:
        torch.autograd.grad(run(x), x, d_out)

    step()
    benchmark.group = f"{group}, {'compiled' if compiled else 'eager'}"
    benchmark(step)
