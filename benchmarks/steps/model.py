"""A call of a whole SoraDiT, as a sampler makes it: eager, its blocks compiled, and captured as a CUDA graph."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.graphs import captured
from benchmarks.rows import Row, distances, start_afresh
from benchmarks.shapes import PACKS
from benchmarks.steps.wholes import leave_out_the_wrong, made, need_gpu, notes
from benchmarks.timing import Work, time_variants
from sora_fast import use_backend
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents

OP = "sora_dit"
# DiT-XL's 28 blocks of width 1152 over a latent of 16 channels; for a dry walk something that has all the same parts.
XL = SoraDiTConfig.of_size("XL", in_channels=16)
SMALL = SoraDiTConfig(dim=64, depth=2, heads=1, in_channels=4)
PACKS_OF_XL, PACKS_OF_SMALL = ("2k ragged", "8k ragged", "32k ragged"), ("tiny",)
Inputs = tuple[RaggedLatents, PackedLayout, Conditioning]


def cases(*, dry: bool) -> list[str]:
    """The names of the rows."""
    return [f"small, {pack}" for pack in PACKS_OF_SMALL] if dry else [f"DiT-XL, {pack}" for pack in PACKS_OF_XL]


def step(device: torch.device, *, seconds: float, dry: bool) -> Callable[[str], list[dict[str, Any]]]:
    """Of a case's name: its row. seconds: of rounds; 0: everything runs once, which fills the compilers' caches. dry: a
    small model's."""
    model = random_model(SMALL if dry else XL, device)

    def do(name: str) -> list[dict[str, Any]]:
        start_afresh()
        series, pack = name.split(", ")
        row = Row(OP, name, "forward", tokens=PACKS[pack].tokens, series=series)
        batch = inputs(model.config, pack, device)
        with use_backend("triton"):
            works = _works(model, batch, row)
            if seconds:
                _judge(works, model, batch, row)
                _time(works, row, device, seconds)
        return [asdict(row)]

    return do


def random_model(config: SoraDiTConfig, device: torch.device, dtype: torch.dtype | None = None) -> SoraDiT:
    """dtype: None: bf16 on a GPU, fp32 on a CPU. All weights are random: gates of 0 would hide what the blocks do."""
    torch.manual_seed(0)
    model = SoraDiT(config).to(device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False).eval()


def inputs(config: SoraDiTConfig, pack: str, device: torch.device) -> Inputs:
    """A batch at random noise levels."""
    torch.manual_seed(0)
    grids = PACKS[pack].grids
    sizes = [[size * p for size, p in zip(grid, config.patch_size, strict=True)] for grid in grids]
    latents = RaggedLatents.from_list([torch.randn(config.in_channels, *size, device=device) for size in sizes])
    layout = PackedLayout.from_grids(grids, order="tiled", device=device)
    return latents, layout, Conditioning.per_segment(torch.rand(len(grids), device=device), layout)


@torch.no_grad()
def call(model: SoraDiT, batch: Inputs) -> Tensor:
    """The prediction's pixels, of all videos."""
    latents, layout, conditioning = batch
    return model(latents, layout, conditioning).flat


def _eager(model: SoraDiT, batch: Inputs) -> Work:
    return partial(call, model, batch)


def _compiled(model: SoraDiT, batch: Inputs) -> Work:
    """Block by block, as our trainer does it: one graph serves them all."""
    need_gpu(batch[1].device)
    own = deepcopy(model)
    for block in own.blocks:
        block.compile(fullgraph=True, dynamic=False)
    return partial(call, own, batch)


def _graph(model: SoraDiT, batch: Inputs) -> Work:
    need_gpu(batch[1].device)
    return captured(partial(call, model, batch), batch[1].device)


_VARIANTS: Mapping[str, Callable[[SoraDiT, Inputs], Work]] = {
    "triton": _eager,
    "triton, compiled": _compiled,
    "triton, graph": _graph,
}


def _works(model: SoraDiT, batch: Inputs, row: Row) -> dict[str, Work]:
    """Those that ran once."""

    def tried(make: Callable[[SoraDiT, Inputs], Work]) -> Work:
        work = make(model, batch)
        work()
        return work

    return made({name: partial(tried, make) for name, make in _VARIANTS.items()}, row)


def _judge(works: dict[str, Work], model: SoraDiT, batch: Inputs, row: Row) -> None:
    """Beside PyTorch in fp64."""
    with use_backend("torch"):
        truth, plain = call(deepcopy(model).double(), batch), call(model, batch)
    row.errors = {"torch": distances([plain], [truth])}
    row.errors |= {name: distances([work()], [truth]) for name, work in works.items()}
    leave_out_the_wrong(works, row)


def _time(works: Mapping[str, Work], row: Row, device: torch.device, seconds: float) -> None:
    """As a sampler has it, which waits for the host where that is the slower."""
    row.rounds = time_variants(works, device=device, seconds=seconds, asleep=False)
    row.notes = notes(works, row, device)
