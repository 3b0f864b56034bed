"""Videos cut up and put together one by one, in raster order. Sizes that the patch does not divide are beyond them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.entrants import Absent, Entrant
from benchmarks.peers.compiling import compiled as compile_peer
from benchmarks.peers.order import Raster
from sora_fast import use_backend
from sora_fast.ops import unpatchify


def embed(case: Case, compete: Callable[..., Entrant] = Entrant.peer) -> Entrant:
    """reshape and F.linear."""
    latents, _, _, layout, (pt, ph, pw), *position = case.args
    if position or latents.flat.requires_grad:
        raise Absent("it has no positions and no gradient of the pixels")
    videos = [
        video.view(len(video), t, pt, h, ph, w, pw)
        for video, (t, h, w) in zip(latents.to_list(), layout.grids.tolist(), strict=True)
    ]

    def run(weight: Tensor, bias: Tensor) -> Tensor:
        patches = [video.permute(1, 3, 5, 0, 2, 4, 6).flatten(0, 2).flatten(1) for video in videos]
        return F.linear(torch.cat(patches), weight, bias)

    order = Raster.of(layout)
    return compete(case, run, pack=order.pack, unpack=order.unpack)


def assemble(case: Case, compete: Callable[..., Entrant] = Entrant.peer) -> Entrant:
    """One permutation a video."""
    _, layout, patch_size, _ = case.args
    grids = layout.grids.tolist()
    lengths = [t * h * w for t, h, w in grids]
    sizes = dict(zip("thw", patch_size, strict=True))
    order = case.options.get("order", "thwc")
    patch = [sizes.get(axis, -1) for axis in order]
    c, pt, ph, pw = (3 + order.index(axis) for axis in "cthw")

    def run(tokens: Tensor) -> Tensor:
        parts = zip(tokens.split(lengths), grids, strict=True)
        boxes = (part.view(*grid, *patch) for part, grid in parts)
        return torch.cat([box.permute(c, 0, pt, 1, ph, 2, pw).flatten() for box in boxes])

    raster = Raster.of(layout)
    return compete(case, run, pack=raster.pack, unpack=raster.unpack)


def product_then_assemble(case: Case, compete: Callable[..., Entrant] = Entrant.peer) -> Entrant:
    """F.linear, then `assemble`."""
    x, _, _, *rest = case.args
    tokens = assemble(replace(case, args=(x, *rest)))

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return tokens.forward(F.linear(x, weight, bias))

    return compete(case, run, pack=tokens.pack, unpack=tokens.unpack)


def product_then_ours(case: Case) -> Entrant:
    """F.linear, then our own scatter: the other form that FinalLayerConfig chooses from."""

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return unpatchify(F.linear(x, weight, bias), *case.args[3:]).flat

    return Entrant.peer(case, run, within=partial(use_backend, "triton" if case.device.type == "cuda" else "torch"))


def embed_compiled(case: Case) -> Entrant:
    return embed(case, compile_peer)


def assemble_compiled(case: Case) -> Entrant:
    return assemble(case, compile_peer)


def product_then_assemble_compiled(case: Case) -> Entrant:
    return product_then_assemble(case, compile_peer)
