"""What sampling costs beside the model, the driver with a model that costs nothing, per pack of mixed videos; and the
engine with a model like the demo's, beside the sampler before it. What the engine's options cost in quality, and whole
calls compiled, are `python -m benchmarks.sampler`'s, on a trained run."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import sampler as before
from benchmarks.sampler import MIXED, SINGLE, requests
from sora_fast.demo.run import FULL, run_config
from sora_fast.diffusion import (
    DDIM,
    DDPM,
    Ancestral,
    DPMSolver2M,
    Euler,
    Guided,
    Heun,
    NoisePath,
    RectifiedFlow,
    Sampler,
    clean_frames,
    noise_like,
    sample,
    training_loss,
)
from sora_fast.generation.engine import Engine
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.training.run import Networks

PATCH = (1, 2, 2)
STEPS = 4
# A thumbnail, two clips of different aspect ratios and a long one: 5,632 tokens of 16-channel latents.
SHAPES = [(16, 1, 32, 32), (16, 8, 24, 40), (16, 8, 40, 24), (16, 16, 16, 23)]


def no_model(latents: RaggedLatents, layout: PackedLayout, conditioning: Conditioning, **_: Tensor) -> RaggedLatents:
    return latents


def pack() -> tuple[RaggedLatents, PackedLayout, Tensor]:
    """Noise, its layout, and a clean first frame in each clip."""
    latents = RaggedLatents.empty(SHAPES)
    grids = [tuple(-(-size // p) for size, p in zip(shape[1:], PATCH, strict=True)) for shape in SHAPES]
    layout = PackedLayout.from_grids(grids, order="tiled")
    clean = clean_frames(layout, torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 0]))
    return latents.with_flat(noise_like(latents, torch.Generator().manual_seed(0))), layout, clean


@pytest.mark.parametrize(
    ("path", "sampler"),
    [
        (RectifiedFlow(), Euler()),
        (RectifiedFlow(), Heun()),
        (RectifiedFlow(), DPMSolver2M()),
        (DDPM(), DDIM()),
        (DDPM(), Ancestral()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_sampler(benchmark: Any, path: NoisePath, sampler: Sampler) -> None:
    noise, layout, clean = pack()
    benchmark.extra_info["steps"] = STEPS
    benchmark(sample, no_model, noise, layout, path, sampler, steps=STEPS, patch_size=PATCH, data=noise, clean=clean)


def test_guidance(benchmark: Any) -> None:
    noise, layout, clean = pack()
    guided = Guided(no_model, layout, scale=4.0, labels=torch.zeros(4), null_labels=torch.ones(4))
    conditioning = Conditioning.with_clean(torch.full((4,), 0.5), clean, layout)
    benchmark(guided, noise, layout, conditioning)


@pytest.mark.parametrize("path", [RectifiedFlow(), DDPM()], ids=lambda value: type(value).__name__)
def test_training_loss(benchmark: Any, path: NoisePath) -> None:
    noise, layout, clean = pack()
    sigma = path.sample_sigma(layout, torch.Generator().manual_seed(0))
    benchmark(training_loss, no_model, noise, layout, path, sigma, noise=noise.flat, patch_size=PATCH, clean=clean)


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Untrained: its weights do not change what it costs."""
    return Engine(Networks(run_config(FULL)), compile=False)


@pytest.mark.parametrize("shapes", [[SINGLE], MIXED], ids=["single", "mixed"])
@pytest.mark.parametrize("way", ["engine", "before"])
def test_engine(benchmark: Any, engine: Engine, shapes: list[tuple[int, int, int]], way: str) -> None:
    benchmark.group, benchmark.extra_info["steps"] = f"engine[{len(shapes)}]", STEPS
    if way == "engine":
        benchmark(engine.generate, requests(shapes), steps=STEPS)
    else:
        benchmark(before.generate, engine, requests(shapes), steps=STEPS)
