"""Videos cut up and put together one by one, in raster order. Sizes that the patch does not divide are beyond them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.entrants import Absent, Entrant
from benchmarks.peers.compiling import compiled as compile_peer
from benchmarks.peers.order import Raster


def embed(case: Case, compete: Callable[..., Entrant] = Entrant.peer) -> Entrant:
    """reshape and F.linear."""
    latents, _, _, layout, patch, *position = case.args
    if position or latents.flat.requires_grad:
        raise Absent("it has no positions and no gradient of the pixels")
    videos = latents.to_list()
    cut = partial(rearrange, pattern="c (t pt) (h ph) (w pw) -> (t h w) (c pt ph pw)", **_sides(patch))

    def run(weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(torch.cat([cut(video) for video in videos]), weight, bias)

    order = Raster.of(layout)
    return compete(case, run, pack=order.pack, unpack=order.unpack)


def assemble(case: Case, compete: Callable[..., Entrant] = Entrant.peer) -> Entrant:
    """One permutation a video."""
    _, layout, patch, _ = case.args
    glue = partial(rearrange, pattern="(t h w) (pt ph pw c) -> c (t pt) (h ph) (w pw)", **_sides(patch))
    grids = layout.grids.tolist()
    lengths = [t * h * w for t, h, w in grids]

    def run(tokens: Tensor) -> Tensor:
        parts = zip(tokens.split(lengths), grids, strict=True)
        return torch.cat([glue(part, t=t, h=h, w=w).flatten() for part, (t, h, w) in parts])

    order = Raster.of(layout)
    return compete(case, run, pack=order.pack, unpack=order.unpack)


def embed_compiled(case: Case) -> Entrant:
    return embed(case, compile_peer)


def assemble_compiled(case: Case) -> Entrant:
    return assemble(case, compile_peer)


def _sides(patch: tuple[int, int, int]) -> dict[str, Any]:
    return dict(zip(("pt", "ph", "pw"), patch, strict=True))
