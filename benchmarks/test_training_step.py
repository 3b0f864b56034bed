"""One training step of SoraDiT, optimiser included: on a ragged pack, eager and compiled, on each backend.

And of the demo's model on the demo's clips, packed, padded and in exact buckets, all compiled (see training_ways.py).
"""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.cases import CHANNELS, PATCH
from benchmarks.demo_mix import MIXES, WAYS, Contents, draw
from benchmarks.nvml import Gauge
from benchmarks.shapes import MASKS, PACKS
from benchmarks.training_ways import trainee
from sora_fast import use_backend
from sora_fast.diffusion import RectifiedFlow, training_loss
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.models.sora_dit import SIZES
from sora_fast.packing import PackedLayout, RaggedLatents

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# DiT's width and heads, not its depth: more blocks are more of the same.
SIZE, DEPTH, PACK = ("XL", 8, "32k ragged") if ON_GPU else ("S", 2, "2k ragged")
_, WIDTH, HEADS = SIZES[SIZE]


def training_step(mask: str, *, compiled: bool) -> Callable[[], None]:
    """Weights in fp32, computing in bf16 on a GPU; the blocks are compiled, as the trainer has it."""
    torch.manual_seed(0)
    torch.compiler.reset()
    grids = PACKS[PACK].grids
    layout = PackedLayout.from_grids(grids, order="tiled", for_mask=MASKS[mask], device=DEVICE)
    videos = [torch.randn(CHANNELS, *(s * p for s, p in zip(grid, PATCH, strict=True))) for grid in grids]
    latents = RaggedLatents.from_list(videos).to(DEVICE)
    config = SoraDiTConfig(WIDTH, DEPTH, HEADS, CHANNELS, PATCH, mask=MASKS[mask])
    model = SoraDiT(config).to(DEVICE)
    for block in model.blocks if compiled else ():
        block.compile(fullgraph=True, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=ON_GPU)
    sigma, noise = torch.rand(len(grids), device=DEVICE), torch.randn_like(latents.flat)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            loss = training_loss(model, latents, layout, RectifiedFlow(), sigma, noise=noise, patch_size=PATCH)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops(mask: str) -> int:
    """Of the blocks, forward and backward: three times the products forward, and attention's scores once more."""
    pairs = sum(map(MASKS[mask].pairs, PACKS[PACK].grids))
    linear = 2 * PACKS[PACK].tokens * 12 * WIDTH**2
    return DEPTH * (3 * linear + 7 * 2 * pairs * WIDTH)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["torch", "triton"] if ON_GPU else ["torch"])
@pytest.mark.parametrize("mask", ["full", "frame_causal"])
def test_training_step(benchmark: Any, mask: str, backend: str, compiled: bool) -> None:
    variant = backend + ", compiled" * compiled
    step = training_step(mask, compiled=compiled)
    benchmark.group = f"training_step[{mask}, {PACK}]"
    benchmark.extra_info.update(op="training_step", case=f"DiT-{SIZE} of {DEPTH} blocks, {mask}", direction="step")
    benchmark.extra_info.update(backend=variant, flops=flops(mask), tokens=PACKS[PACK].tokens)
    with use_backend(backend):
        benchmark.pedantic(step, rounds=5, warmup_rounds=2)
        if ON_GPU and benchmark.enabled:
            benchmark.extra_info.update(Gauge(DEVICE).read(step, 1e3 * benchmark.stats.stats.median))


# Padding and buckets on the demo's own mix; packing also where all clips are alike, and where they differ more.
WAYS_OF_MIXES = [("demo", way) for way in WAYS] + [("one shape", "packed"), ("more ragged", "packed")]
# Useful tokens of a round: seven packs, or seven buckets at evenly spread lengths.
USEFUL = 13_000


@pytest.mark.skipif(ON_GPU, reason="the peers are set up for a CPU")
@pytest.mark.parametrize(("mix", "way"), WAYS_OF_MIXES)
def test_ways(benchmark: Any, mix: str, way: str) -> None:
    if not benchmark.enabled:
        pytest.skip("takes minutes to compile")
    grids = draw(MIXES[mix], 20_000)
    every = WAYS[way](grids)
    batches = list(_first(every, USEFUL))
    entrant = trainee(way, batches)
    benchmark.group = f"training ways[{mix}]"
    benchmark.pedantic(entrant.work, rounds=7)
    useful, computed = sum(batch.useful for batch in batches), sum(batch.computed for batch in batches)
    benchmark.extra_info |= {"op": "training_ways", "case": mix, "direction": "step", "backend": way, "tokens": useful}
    benchmark.extra_info |= {
        "useful_tokens_per_second": useful / benchmark.stats.stats.median,
        "computed_in_vain": 1 - sum(batch.useful for batch in every) / sum(batch.computed for batch in every),
        "computed_in_vain_here": 1 - useful / computed,
        "seconds_to_compile_a_graph": statistics.median(entrant.start_up),
        "graphs_of_the_mix": len(set(grids)) if way == "bucketed" else 1,
    }


def _first(batches: list[Contents], tokens: int) -> Iterator[Contents]:
    """So many that they hold that many useful tokens."""
    total = 0
    for batch in batches:
        if total >= tokens:
            return
        total += batch.useful
        yield batch
