"""Training steps of one model on one mix of clips in three ways, each compiled: padded, of one shape each, packed.

All share the demo's model (without text), AdamW, and a budget of tokens a batch. Making the batches is not timed.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.demo_mix import BUDGET, CHANNELS, PATCH, SEGMENTS, Contents
from benchmarks.peers.padded_dit import PaddedDiT, padded_batch
from sora_fast.diffusion import RectifiedFlow, training_loss
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.packing import PackedLayout, RaggedLatents

PATH = RectifiedFlow(prediction="clean")
# As sora_fast/demo/run.py has it.
CONFIG = SoraDiTConfig(
    dim=128,
    depth=4,
    heads=4,
    in_channels=CHANNELS,
    patch_size=PATCH,
    position="rope+sincos3d",
    rope_theta=100.0,
    position_bias=1.0,
)
Loss = Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Trainee:
    """A model in training. losses: one a batch, compiled; start_up: seconds that the first call of each graph took,
    beside a call's own."""

    model: SoraDiT
    losses: list[Loss]
    start_up: list[float]

    def work(self) -> None:
        """A step on every batch."""
        for loss in self.losses:
            self.step(loss)

    def step(self, loss: Loss) -> None:
        loss().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def __post_init__(self) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        object.__setattr__(self, "_optimizer", optimizer)


def trainee(way: str, batches: list[Contents]) -> Trainee:
    """Warm: every graph is compiled. padded: one graph of any sizes; bucketed: one a shape; packed: one."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = SoraDiT(CONFIG)
    losses = (
        packed_losses(model, batches) if way == "packed" else padded_losses(model, batches, any_size=way == "padded")
    )
    found = Trainee(model, losses, [])
    for loss in losses if way == "bucketed" else losses[:1]:
        first, second = (_seconds(lambda: found.step(loss)) for _ in range(2))  # noqa: B023
        found.start_up.append(first - second)
    found.work()
    return found


def packed_losses(model: SoraDiT, batches: list[Contents]) -> list[Loss]:
    """Of the package's own loss, the layout's content and all that follows from it computed inside."""
    compiled = torch.compile(training_loss, fullgraph=True, dynamic=False)

    def loss_of(contents: Contents) -> Loss:
        videos, noises, sigma = _data(contents)
        elements, segments = BUDGET * CHANNELS * math.prod(PATCH), SEGMENTS
        latents, noise = (
            RaggedLatents.from_list(part, capacity=elements, max_segments=segments) for part in (videos, noises)
        )
        layout = PackedLayout.from_grids(contents.grids, order="tiled", capacity=BUDGET, max_segments=segments)
        sigma = torch.cat([sigma, torch.zeros(segments - len(sigma))])
        return lambda: compiled(model, latents, layout, PATH, sigma, noise=noise.flat, patch_size=PATCH)

    return [loss_of(contents) for contents in batches]


def padded_losses(model: SoraDiT, batches: list[Contents], *, any_size: bool) -> list[Loss]:
    """Of plain PyTorch on [B, L]; any_size: one graph for all B and L, else one for each."""
    compiled = torch.compile(PaddedDiT(model, PATH), fullgraph=True, dynamic=None if any_size else False)

    def loss_of(contents: Contents) -> Loss:
        tensors = padded_batch(model, *_data(contents)).tensors
        for tensor in tensors if any_size else ():
            torch._dynamo.mark_dynamic(tensor, 0)
            if tensor.ndim > 1:
                torch._dynamo.mark_dynamic(tensor, 2 if tensor.ndim == 4 else 1)
        return lambda: compiled(*tensors)

    return [loss_of(contents) for contents in batches]


def _data(contents: Contents) -> tuple[list[Tensor], list[Tensor], Tensor]:
    shapes = [(CHANNELS, *(n * p for n, p in zip(grid, PATCH, strict=True))) for grid in contents.grids]
    return [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes], torch.rand(len(shapes))


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
