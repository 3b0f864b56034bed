"""patch_embed beside its peers; and patches of other sizes, on one core, in both orders."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.contests import Contest, contests
from sora_fast.ops import patch_embed
from sora_fast.packing import PackedLayout, RaggedLatents

WIDTH = 384


@dataclass(frozen=True)
class Geometry:
    """Videos of `channels` in patches `patch`; grids: in patches."""

    channels: int
    patch: tuple[int, int, int]
    grids: tuple[tuple[int, int, int], ...] = ((8, 16, 16), (1, 32, 24), (4, 12, 20))


# K, the numbers in a patch: the fewest in use, those of a modern autoencoder's latents, and raw pixels.
GEOMETRIES = {
    "K=4": Geometry(4, (1, 1, 1)),
    "K=64": Geometry(16, (1, 2, 2)),
    "K=3072": Geometry(3, (4, 16, 16), ((2, 8, 8), (1, 16, 12), (1, 6, 10))),
}

Embed = Callable[[Geometry, list[Tensor], Tensor, Tensor], Tensor]


def ours(order: str) -> Embed:
    layouts = {name: PackedLayout.from_grids(g.grids, order=order) for name, g in GEOMETRIES.items()}

    def run(geometry: Geometry, videos: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        layout = layouts[f"K={weight.shape[1]}"]
        return patch_embed(RaggedLatents.from_list(videos), weight, bias, layout, geometry.patch)

    return run


def one_by_one(geometry: Geometry, videos: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """The baseline: reshape and F.linear. Sizes that the patch does not divide and other orders are beyond it."""
    pt, ph, pw = geometry.patch
    cut = "c (t pt) (h ph) (w pw) -> (t h w) (c pt ph pw)"
    patches = torch.cat([rearrange(video, cut, pt=pt, ph=ph, pw=pw) for video in videos])
    return F.linear(patches, weight, bias)


@contests("patch_embed")
def test_patch_embed(contest: Contest) -> None:
    contest.enter()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize(
    "embed", [one_by_one, ours("raster"), ours("tiled")], ids=["one by one", "packed, raster", "packed, tiled"]
)
def test_other_patches(benchmark: Any, embed: Embed, name: str, compiled: bool) -> None:
    torch.manual_seed(0)
    geometry = GEOMETRIES[name]
    sizes = [[size * p for size, p in zip(grid, geometry.patch, strict=True)] for grid in geometry.grids]
    videos = [torch.randn(geometry.channels, *size) for size in sizes]
    weight = torch.randn(WIDTH, int(name.removeprefix("K=")), requires_grad=True)
    bias = torch.randn(WIDTH, requires_grad=True)
    run = torch.compile(embed, fullgraph=True) if compiled else embed
    d_tokens = torch.randn(run(geometry, videos, weight, bias).shape)

    def step() -> None:
        torch.autograd.grad(run(geometry, videos, weight, bias), (weight, bias), d_tokens)

    step()
    benchmark.group = f"{name}, {'compiled' if compiled else 'eager'}"
    benchmark(step)
