"""patch_embed on one core, forward and the weights' gradient, beside the same videos cut up one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sora_fast.ops import patch_embed
from sora_fast.packing import PackedLayout, RaggedLatents

PATCH, CHANNELS, WIDTH = (1, 2, 2), 4, 384
GRIDS = [(8, 16, 16), (1, 32, 24), (4, 12, 20)]


def ours(order: str) -> Callable[[list[Tensor], Tensor, Tensor], Tensor]:
    layout = PackedLayout.from_grids(GRIDS, order=order)

    def run(videos: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        return patch_embed(RaggedLatents.from_list(videos), weight, bias, layout, PATCH)

    return run


def one_by_one(videos: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """The baseline: reshape and F.linear. Sizes that the patch does not divide and other orders are beyond it."""
    pt, ph, pw = PATCH
    cut = "c (t pt) (h ph) (w pw) -> (t h w) (c pt ph pw)"
    patches = torch.cat([rearrange(video, cut, pt=pt, ph=ph, pw=pw) for video in videos])
    return F.linear(patches, weight, bias)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "embed", [one_by_one, ours("raster"), ours("tiled")], ids=["one by one", "packed, raster", "packed, tiled"]
)
def test_patch_embed(benchmark: Any, embed: Callable[..., Tensor], compiled: bool) -> None:
    torch.manual_seed(0)
    videos = [torch.randn(CHANNELS, *(s * p for s, p in zip(grid, PATCH, strict=True))) for grid in GRIDS]
    weight = torch.randn(WIDTH, CHANNELS * 4, requires_grad=True)
    bias = torch.randn(WIDTH, requires_grad=True)
    run = torch.compile(embed, fullgraph=True) if compiled else embed
    d_tokens = torch.randn(run(videos, weight, bias).shape)

    def step() -> None:
        torch.autograd.grad(run(videos, weight, bias), (weight, bias), d_tokens)

    step()
    benchmark(step)
