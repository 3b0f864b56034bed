"""qk_norm_rope on one core, forward and backward, beside PyTorch written out, and norms without rotation; then the
forms that other people's blocks need."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.ops import Rope3D, RopeTable, qk_norm_rope
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


def _over_all_heads(x: Tensor, weight: Tensor, bias: None) -> Tensor:
    return F.rms_norm(x.flatten(1), weight.shape, weight, 1e-6).view_as(x)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, 1e-6)


# By the models that have them. Norm, its weights' size, and what turns: nothing, the op's own angles, a table by head.
FORMS: dict[str, tuple[str, int, Callable[..., Tensor], str]] = {
    "queries alone": ("rms_across_heads", HEADS * HEAD_DIM, _over_all_heads, ""),
    "Wan": ("rms_across_heads", HEADS * HEAD_DIM, _over_all_heads, "angles"),
    "LTX": ("rms_across_heads", HEADS * HEAD_DIM, _over_all_heads, "table"),
    "CogVideoX": ("layer", HEAD_DIM, _layer_norm, "angles"),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("own", [True, False], ids=["ours", "written_out"])
@pytest.mark.parametrize("name", FORMS)
def test_forms(benchmark: Any, name: str, own: bool, compiled: bool) -> None:
    """The tables of what is written out are made once for all layers."""
    norm, size, normed, turning = FORMS[name]
    torch.manual_seed(0)
    sides = 1 if name == "queries alone" else 2
    qkv = torch.randn(LAYOUT.capacity, 3, HEADS, HEAD_DIM, requires_grad=True)
    vectors = [torch.randn(size, requires_grad=True) for _ in range(sides * (2 if norm == "layer" else 1))]
    d_out = torch.randn(sides, LAYOUT.capacity, HEADS, HEAD_DIM).unbind()
    angles = INTERLEAVED.angles(HEAD_DIM, LAYOUT.segment_ids, LAYOUT.coords, LAYOUT.grids)[:, None]
    angles = angles.repeat(1, HEADS, 1) if turning == "table" else angles
    turn = torch.stack([angles.cos(), angles.sin()])
    rope = {"": None, "angles": INTERLEAVED, "table": RopeTable(*turn)}[turning]

    def ours(*tensors: Tensor) -> list[Tensor]:
        q, k, weights, biases = _sorted(tensors, sides)
        results = qk_norm_rope(q, k, *weights, LAYOUT, rope, norm=norm, q_bias=biases[0], k_bias=biases[1])
        return [x for x in results if x is not None]

    def plain(*tensors: Tensor) -> list[Tensor]:
        q, k, weights, biases = _sorted(tensors, sides)
        results = [normed(x, w, b) for x, w, b in zip((q, k), weights, biases, strict=True) if x is not None]
        return [neighbours(x, turn) if turning else x for x in results]

    run = ours if own else plain
    run = torch.compile(run, fullgraph=True) if compiled else run

    def step() -> list[Tensor]:
        outputs = run(*qkv.unbind(1)[:sides], *vectors)
        return [*outputs, *torch.autograd.grad(outputs, (qkv, *vectors), d_out)]

    results = step()
    torch.testing.assert_close(results[:sides], plain(*qkv.unbind(1)[:sides], *vectors), rtol=1e-4, atol=1e-4)
    benchmark(step)


def _sorted(tensors: tuple[Tensor, ...], sides: int) -> tuple[Any, ...]:
    """q, k, (their weights), (their biases); None for what is not there."""
    by_kind = [(*tensors[i : i + sides], None, None)[:2] for i in range(0, 3 * sides, sides)]
    (q, k), weights, biases = by_kind
    return q, k, weights, biases
