"""unpatchify on one core, forward and backward, beside the same videos put together one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from sora_fast.ops import unpatchify
from sora_fast.packing import PackedLayout, RaggedLatents

PATCH, CHANNELS = (1, 2, 2), 16
GRIDS = [(8, 16, 16), (1, 32, 24), (4, 12, 20)]
LAYOUTS = {order: PackedLayout.from_grids(GRIDS, order=order) for order in ("raster", "tiled")}
LATENTS = RaggedLatents.empty([(CHANNELS, t, h * 2, w * 2) for t, h, w in GRIDS])


def ours(order: str) -> Callable[[Tensor], Tensor]:
    return lambda tokens: unpatchify(tokens, LAYOUTS[order], PATCH, LATENTS).flat


def one_by_one(tokens: Tensor) -> Tensor:
    """The baseline: one permutation a video. Cropping, dropped tokens and other orders are beyond it."""
    glue = "(t h w) (ph pw c) -> (c t h ph w pw)"
    parts = tokens.split([t * h * w for t, h, w in GRIDS])
    sizes = [{"t": t, "h": h, "w": w, "ph": PATCH[1], "pw": PATCH[2]} for t, h, w in GRIDS]
    return torch.cat([rearrange(part, glue, **size) for part, size in zip(parts, sizes, strict=True)])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "assemble", [one_by_one, ours("raster"), ours("tiled")], ids=["one by one", "packed, raster", "packed, tiled"]
)
def test_unpatchify(benchmark: Any, assemble: Callable[[Tensor], Tensor], compiled: bool) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(LAYOUTS["raster"].capacity, 4 * CHANNELS, requires_grad=True)
    d_flat = torch.randn(LATENTS.flat.shape)
    run = torch.compile(assemble, fullgraph=True) if compiled else assemble

    def step() -> None:
        torch.autograd.grad(run(tokens), tokens, d_flat)

    step()
    benchmark(step)
