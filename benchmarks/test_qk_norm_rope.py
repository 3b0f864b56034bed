"""qk_norm_rope on one core, forward and backward, beside PyTorch written out, and norms without rotation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.ops import Rope3D, qk_norm_rope
from sora_fast.packing import PackedLayout

LAYOUT = PackedLayout.from_grids([(4, 12, 20), (1, 32, 24)], order="tiled")
HEADS, HEAD_DIM = 6, 64
INTERLEAVED, HALF_SPLIT = Rope3D(), Rope3D(interleaved=False)
NTK = Rope3D(scaling="ntk", scale=(1.0, 0.5, 0.5), extent=(None, 32.0, 32.0))


def ours(rope: Rope3D | None) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda q, k, q_weight, k_weight: qk_norm_rope(q, k, q_weight, k_weight, LAYOUT, rope)


def norms_alone(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own norm, the least that any of the others does."""
    return F.rms_norm(q, (HEAD_DIM,), q_weight, 1e-6), F.rms_norm(k, (HEAD_DIM,), k_weight, 1e-6)


def written_out(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *, turn: Tensor, rotate: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """The baseline, with the angles made once for all layers. Padding is beyond it."""
    q, k = norms_alone(q, k, q_weight, k_weight)
    return rotate(q, turn), rotate(k, turn)


def neighbours(x: Tensor, turn: Tensor) -> Tensor:
    """Neighbouring channels, in real numbers: Inductor makes no code for complex ones. turn: [2, N, 1, D/2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * turn[0] - b * turn[1], a * turn[1] + b * turn[0]], dim=-1).flatten(-2)


def two_halves(x: Tensor, turn: Tensor) -> Tensor:
    """Channels of the two halves, as GPT-NeoX turns them. turn: [2, N, 1, D], cosines and sines."""
    a, b = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat([-b, a], dim=-1) * turn[1]


def _peers() -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    angles = INTERLEAVED.angles(HEAD_DIM, LAYOUT.segment_ids, LAYOUT.coords, LAYOUT.grids)[:, None]
    turn = torch.stack([angles.cos(), angles.sin()])
    return {
        "written_out, interleaved": partial(written_out, turn=turn, rotate=neighbours),
        "written_out, half-split": partial(written_out, turn=turn.repeat(1, 1, 1, 2), rotate=two_halves),
        "F.rms_norm": norms_alone,
    }


OPS = {
    **_peers(),
    "no rotation": ours(None),
    "interleaved": ours(INTERLEAVED),
    "half-split": ours(HALF_SPLIT),
    "scaled": ours(NTK),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", OPS)
def test_qk_norm_rope(benchmark: Any, name: str, compiled: bool) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(LAYOUT.capacity, 3, HEADS, HEAD_DIM, requires_grad=True)
    weights = [torch.randn(HEAD_DIM, requires_grad=True) for _ in range(2)]
    d_out = torch.randn(2, LAYOUT.capacity, HEADS, HEAD_DIM)
    run = torch.compile(OPS[name], fullgraph=True) if compiled else OPS[name]

    def step() -> tuple[Tensor, ...]:
        q, k, _ = qkv.unbind(1)
        outputs = run(q, k, *weights)
        return *outputs, *torch.autograd.grad(outputs, (qkv, *weights), d_out.unbind())

    results = step()
    same = name.removeprefix("written_out, ")
    if same != name:  # what is timed must be the same work
        q, k, _ = qkv.unbind(1)
        torch.testing.assert_close(results[:2], OPS[same](q, k, *weights), rtol=1e-4, atol=1e-4)
    benchmark(step)
