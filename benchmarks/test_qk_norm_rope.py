"""qk_norm_rope on one core, forward and backward, beside RMSNorm without a rotation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.ops import Rope3D, qk_norm_rope
from sora_fast.packing import PackedLayout

LAYOUT = PackedLayout.from_grids([(4, 12, 20), (1, 32, 24)], order="tiled")
HEADS, HEAD_DIM = 6, 64


def ours(rope: Rope3D | None) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda q, k, q_weight, k_weight: qk_norm_rope(q, k, q_weight, k_weight, LAYOUT, rope)


def norms_alone(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The baseline: PyTorch's own norm, the least that any of the others does."""
    return F.rms_norm(q, (HEAD_DIM,), q_weight, 1e-6), F.rms_norm(k, (HEAD_DIM,), k_weight, 1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "op",
    [norms_alone, ours(None), ours(Rope3D()), ours(Rope3D(interleaved=False))],
    ids=["F.rms_norm", "no rotation", "interleaved", "half-split"],
)
def test_qk_norm_rope(benchmark: Any, op: Callable[..., tuple[Tensor, Tensor]], compiled: bool) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(LAYOUT.capacity, 3, HEADS, HEAD_DIM, requires_grad=True)
    weights = [torch.randn(HEAD_DIM, requires_grad=True) for _ in range(2)]
    d_out = torch.randn(2, LAYOUT.capacity, HEADS, HEAD_DIM)
    run = torch.compile(op, fullgraph=True) if compiled else op

    def step() -> None:
        q, k, _ = qkv.unbind(1)
        torch.autograd.grad(run(q, k, *weights), (qkv, *weights), d_out.unbind())

    step()
    benchmark(step)
