"""The published DiT as a whole, beside diffusers' with the same weights: a batch of images of one size, which is all
that diffusers takes. `dit.forward` is ours, its packing included."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.entrants import Absent
from benchmarks.nvml import Gauge
from benchmarks.peers.dit import call, diffusers_dit
from sora_fast import use_backend
from sora_fast.integrations import dit
from sora_fast.models import SoraDiT

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Latents of 256 × 256 pixels; every block costs the same, so that on a CPU two of S's are enough.
SIZE, DEPTH, IMAGES, SIDE = ("XL", 28, 32, 32) if ON_GPU else ("S", 2, 8, 32)
# Relative to fp64: what a checkpoint's numbers keep to in fp32.
TOLERANCE = 1e-5

Inputs = tuple[Tensor, Tensor, Tensor]
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs() -> Inputs:
    """Latents [S, C, H, W], timesteps and labels [S]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 4, SIDE, SIDE, generator=generator)
    t = torch.randint(1000, (IMAGES,), generator=generator)
    return images.to(DEVICE), t.to(DEVICE), torch.arange(IMAGES, device=DEVICE)


def random_model() -> SoraDiT:
    """Every weight is random: DiT's own start, gates of zero, would hide what the blocks do."""
    torch.manual_seed(0)
    model = SoraDiT(replace(dit.config(SIZE, 2), depth=DEPTH))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.to(DEVICE).eval()


def ours(model: SoraDiT, compiled: bool) -> Call:
    if compiled:
        compile_each(model.blocks)
    return lambda images, t, labels: torch.stack(dit.forward(model, images[:, :, None].unbind(), t, labels))[:, :, 0]


def theirs(model: SoraDiT, compiled: bool) -> Call:
    module = diffusers_dit(model, SIDE)
    if compiled:
        compile_each(module.transformer_blocks)
    return lambda *inputs: call(module, *inputs)


def compile_each(blocks: Iterable[torch.nn.Module]) -> None:
    """Blocks are compiled, as both our trainer and diffusers' guide to regional compilation have it."""
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)


def distance(call: Call, model: SoraDiT) -> float:
    """Relative, from what `model` gives in fp64."""
    images, t, labels = inputs()
    with torch.no_grad(), use_backend("torch"):
        truth = ours(deepcopy(model).double(), compiled=False)(images.double(), t, labels)
    # diffusers embeds patches by a convolution, which PyTorch would compute in TF32 on a GPU.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return float((call(images, t, labels) - truth).norm() / truth.norm())


def work(call: Call, direction: str) -> Callable[[], None]:
    """In bf16 on a GPU. A forward pass as in sampling, without a graph, or one and a backward pass."""
    images, t, labels = inputs()

    def step() -> None:
        with (
            torch.set_grad_enabled(direction != "forward"),
            torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU),
        ):
            out = call(images, t, labels)
        if out.requires_grad:
            out.float().square().mean().backward()

    return step


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("who", ["torch", "triton", "diffusers"] if ON_GPU else ["torch", "diffusers"])
def test_dit(benchmark: Any, who: str, compiled: bool, direction: str) -> None:
    torch.compiler.reset()
    model = random_model()
    try:
        call = theirs(model, compiled) if who == "diffusers" else ours(model, compiled)
    except Absent as reason:
        pytest.skip(f"{who}: {reason}")
    variant = who + ", compiled" * compiled
    with use_backend("triton" if who == "triton" else "torch"):
        error = distance(call, model)
        assert error <= TOLERANCE, f"{variant} is {error:.1e} from fp64; it is not timed"
        benchmark.group = f"dit[DiT-{SIZE}/2 of {DEPTH} blocks, {IMAGES} images], {direction}"
        benchmark.extra_info.update(op="dit", case=f"DiT-{SIZE}/2 of {DEPTH} blocks, {IMAGES} images")
        benchmark.extra_info.update(direction=direction, backend=variant, error=error)
        benchmark.extra_info["tokens"] = IMAGES * (SIDE // 2) ** 2
        step = work(call, direction)
        benchmark.pedantic(step, rounds=10, warmup_rounds=2)
        if ON_GPU and benchmark.enabled:
            benchmark.extra_info.update(Gauge(DEVICE).read(step, 1e3 * benchmark.stats.stats.median))
