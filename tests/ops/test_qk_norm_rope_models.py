"""qk_norm_rope gives what published models do to their queries and keys, each written out here as its authors did.

They round after every step, and we once; so both are compared with the same definition in fp64.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.ops import Rope3D, RopeTable, qk_norm_rope
from sora_fast.packing import PackedLayout
from tests.helpers import assert_within_rule
from tests.ragged import DTYPES

BACKENDS = ("torch", "triton")
GRID, TOKENS = (2, 3, 3), 18
LAYOUT = PackedLayout.from_grids([GRID])
HEADS, DIM = 4, 16
Definition = Callable[..., tuple[Tensor, Tensor]]


def places(*axes: Tensor) -> Tensor:
    """[T·H·W, 3] in raster order, of the coordinates along each axis."""
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)


def whole(dtype: torch.dtype) -> list[Tensor]:
    return [torch.arange(side, dtype=dtype) for side in GRID]


def frequencies(size: int, theta: float, dtype: torch.dtype) -> Tensor:
    return 1 / theta ** (torch.arange(0, size, 2, dtype=dtype) / size)


def angles(positions: Tensor, split: tuple[int, ...], thetas: tuple[float, ...]) -> Tensor:
    """[N, D/2]: an axis after the other."""
    return torch.cat(
        [
            positions[:, axis, None] * frequencies(size, thetas[axis], positions.dtype)
            for axis, size in enumerate(split)
        ],
        dim=1,
    )


def turned_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + (−odd, even) · sin, with every cosine and sine twice, as diffusers' blocks do it; in fp32 at least."""
    wide = x.to(cos.dtype)
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    crossed = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (wide * cos.repeat_interleave(2, -1) + crossed * sin.repeat_interleave(2, -1)).to(x.dtype)


def wan(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Wan 2.1: RMSNorm over all channels, then the split into heads, then neighbours turn."""
    side = 2 * (DIM // 6)
    turn = angles(places(*whole(real(q))), (DIM - 2 * side, side, side), (1e4,) * 3)[:, None]
    return tuple(
        turned_neighbours(F.rms_norm(x.flatten(1), weight.shape, weight, 1e-6).view_as(x), turn.cos(), turn.sin())
        for x, weight in ((q, q_weight), (k, k_weight))
    )


def ltx_angles(dtype: torch.dtype) -> Tensor:
    """LTX-Video, [N, H·D/2]: fractional places from −1 to 1, all channels' frequencies, the axes in turn, and the first
    channels, which 6 does not divide, do not turn."""
    fractions = [
        axis * scale / base for axis, scale, base in zip(whole(dtype), (8 / 25, 32, 32), (20, 2048, 2048), strict=True)
    ]
    speeds = 1e4 ** torch.linspace(0, 1, HEADS * DIM // 6, dtype=dtype) * torch.pi / 2
    turning = (places(*fractions)[..., None] * 2 - 1) * speeds
    idle = HEADS * DIM % 6 // 2
    return F.pad(turning.transpose(1, 2).flatten(1), (idle, 0))


def ltx(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation is before the split into heads, so that each has frequencies of its own."""
    turn = ltx_angles(real(q))
    normed = (F.rms_norm(x.flatten(1), w.shape, w, 1e-5) for x, w in ((q, q_weight), (k, k_weight)))
    return tuple(turned_neighbours(x, turn.cos(), turn.sin()).view_as(q) for x in normed)


COSMOS_SIZES = (DIM - 4 * (DIM // 6), 2 * (DIM // 6), 2 * (DIM // 6))
COSMOS_THETAS = tuple(1e4 * s ** (d / (d - 2)) for s, d in zip((2.0, 1.0, 3.0), COSMOS_SIZES, strict=True))


def cosmos_places(dtype: torch.dtype) -> Tensor:
    t, h, w = whole(dtype)
    return places(t / 30 * 24, h, w)  # frames at 30 a second, where 24 were trained


def cosmos(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cosmos: RMSNorm of every head, NTK with a factor an axis, frames by their rate, halves of the head turn."""
    turn = angles(cosmos_places(real(q)), COSMOS_SIZES, COSMOS_THETAS)[:, None].repeat(1, 1, 2)

    def one(x: Tensor, weight: Tensor) -> Tensor:
        wide = F.rms_norm(x, weight.shape, weight, 1e-6).to(turn.dtype)
        a, b = wide.chunk(2, dim=-1)
        return (wide * turn.cos() + torch.cat([-b, a], dim=-1) * turn.sin()).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


TEXT = 7  # tokens of the prompt, which come first


def cogvideox_places(dtype: torch.dtype) -> Tensor:
    """Of a region of the trained grid, in as many steps as the video has; the text does not turn."""
    t, h, w = (torch.linspace(0, end * (n - 1) / n, n, dtype=dtype) for end, n in zip((3, 7, 9), GRID, strict=True))
    return torch.cat([torch.zeros(TEXT, 3, dtype=dtype), places(t, h, w)])


def cogvideox(q: Tensor, k: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
    """CogVideoX: LayerNorm with a bias of every head, text and video in one sequence."""
    turn = angles(cogvideox_places(real(q))[TEXT:], (DIM // 4, DIM // 8 * 3, DIM // 8 * 3), (1e4,) * 3)[:, None]

    def one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = F.layer_norm(x, weight.shape, weight, bias, 1e-6)
        return torch.cat([x[:TEXT], turned_neighbours(x[TEXT:], turn.cos(), turn.sin())])

    return one(q, *vectors[0::2]), one(k, *vectors[1::2])


def mochi_angles(learned: Tensor) -> Tensor:
    """Mochi, [N, H, D/2]: frequencies [3, H, D/2] that are parameters, at the centres of cells."""
    t, h, w = whole(learned.dtype)
    positions = places(t, (h + 0.5 - 2) * 1.5, (w + 0.5 - 2.5) * 1.5)
    return torch.einsum("nd,dhf->nhf", positions, learned)


def mochi(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
    turn = mochi_angles(learned.to(real(q)))
    return tuple(
        turned_neighbours(F.rms_norm(x, weight.shape, weight, 1e-5), turn.cos(), turn.sin())
        for x, weight in ((q, q_weight), (k, k_weight))
    )


def our_mochi(*tensors: Tensor, layout: PackedLayout, backend: str) -> tuple[Tensor, Tensor]:
    *heads, learned = tensors
    rope = RopeTable.of_angles(mochi_angles(learned.float().cpu()).to(learned.device))
    return qk_norm_rope(*heads, layout, rope, eps=1e-5, backend=backend)


def our_ltx(*tensors: Tensor, layout: PackedLayout, backend: str) -> tuple[Tensor, Tensor]:
    # As its blocks are given them: [N, H·D], every one twice.
    given = ltx_angles(torch.float32).repeat_interleave(2, -1).to(layout.device)
    rope = RopeTable(*(x[:, ::2].unflatten(1, (HEADS, -1)) for x in (given.cos(), given.sin())))
    return qk_norm_rope(*tensors, layout, rope, norm="rms_across_heads", eps=1e-5, backend=backend)


def our_wan(*tensors: Tensor, layout: PackedLayout, backend: str) -> tuple[Tensor, Tensor]:
    return qk_norm_rope(*tensors, layout, Rope3D(), norm="rms_across_heads", eps=1e-6, backend=backend)


def our_cosmos(*tensors: Tensor, layout: PackedLayout, backend: str) -> tuple[Tensor, Tensor]:
    rope, positions = Rope3D(theta=COSMOS_THETAS, interleaved=False), cosmos_places(torch.float32).to(layout.device)
    return qk_norm_rope(*tensors, layout, rope, positions=positions, backend=backend)


def our_cogvideox(q: Tensor, k: Tensor, *vectors: Tensor, layout: PackedLayout, backend: str) -> tuple[Tensor, Tensor]:
    rope, positions = Rope3D((DIM // 4, DIM // 8 * 3, DIM // 8 * 3)), cogvideox_places(torch.float32)
    options = {"norm": "layer", "q_bias": vectors[2], "k_bias": vectors[3], "backend": backend}
    return qk_norm_rope(q, k, *vectors[:2], layout, rope, positions=positions.to(layout.device), **options)


MODELS: dict[str, tuple[Definition, Definition, list[tuple[int, ...]]]] = {
    "Wan": (wan, our_wan, [(HEADS * DIM,)] * 2),
    "LTX": (ltx, our_ltx, [(HEADS * DIM,)] * 2),
    "Cosmos": (cosmos, our_cosmos, [(DIM,)] * 2),
    "CogVideoX": (cogvideox, our_cogvideox, [(DIM,)] * 4),
    "Mochi": (mochi, our_mochi, [(DIM,)] * 2 + [(3, HEADS, DIM // 2)]),
}


def real(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_queries_and_keys_of(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    definition, ours, shapes = MODELS[name]
    layout = PackedLayout.from_grids([(TEXT + TOKENS, 1, 1)]) if name == "CogVideoX" else LAYOUT
    torch.manual_seed(0)
    inputs = [torch.randn(layout.capacity, HEADS, DIM).to(dtype) for _ in range(2)]
    inputs += [torch.randn(shape).to(torch.float32 if len(shape) == 3 else dtype) for shape in shapes]
    grads = [torch.randn(layout.capacity, HEADS, DIM).to(dtype) for _ in range(2)]

    def results(op: Any, device: torch.device, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [change(x).to(device).detach().requires_grad_() for x in inputs]
        outputs = op(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [change(x).to(device) for x in grads])]

    cpu = torch.device("cpu")
    actual = results(partial(ours, layout=layout.to(device), backend=backend), device, lambda x: x)
    plain, oracle = results(definition, cpu, lambda x: x), results(definition, cpu, torch.Tensor.double)
    for place, result in enumerate(actual):
        assert_within_rule(result, plain[place], oracle[place], name=f"result {place} of {name}")
