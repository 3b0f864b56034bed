"""What a call of the engine will do, said before it does it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sora_fast.generation.latency import duration
from sora_fast.generation.phases import Plan
from sora_fast.models import SoraDiT

# In a block without gradients there are at once, of a token: the residual, its normed form, q, k, v and the attended
# values, or the hidden layer before and after its activation: 2 + 2 · 4 widths (2 + 4 with attention).
_WIDTHS = 10


@dataclass(frozen=True)
class Forecast:
    """videos, steps: of the call; guided: steps in which any video is guided.

    tokens: of all videos; seen: by the network, over all steps. bytes: of weights and of one step. seconds: of the
    products and the attention of all steps, at the rate of a product measured here: it takes longer.
    """

    videos: int
    steps: int
    guided: int
    tokens: int
    seen: int
    bytes: int
    seconds: float

    @staticmethod
    def of(model: SoraDiT, plan: Plan, lengths: Sequence[int]) -> "Forecast":
        """lengths: tokens of every request."""
        weight = model.x_embedder.proj.weight
        weights = sum(parameter.numel() for parameter in model.parameters()) * weight.element_size()
        most = max(phase.tokens(lengths) for phase in plan.phases)
        return Forecast(
            videos=len(lengths),
            steps=plan.steps,
            guided=sum(len(phase.steps) for phase in plan.phases if phase.guided),
            tokens=sum(lengths),
            seen=plan.tokens(lengths),
            bytes=weights + most * _WIDTHS * model.config.dim * weight.element_size(),
            seconds=_operations(model, plan, lengths) / _rate(model),
        )

    def __str__(self) -> str:
        videos = "1 video" if self.videos == 1 else f"{self.videos} videos"
        guided = "" if not self.guided else ", all guided" if self.guided == self.steps else f", {self.guided} guided"
        return (
            f"{videos} of {self.tokens:,} tokens, {self.steps} steps{guided}: {self.seen:,} tokens through the network,"
            f" about {self.bytes / 1e6:,.0f} MB, at least {duration(self.seconds)}"
        )


def _operations(model: SoraDiT, plan: Plan, lengths: Sequence[int]) -> float:
    """Floating-point operations of all steps, those that are done once a token or a pair of tokens."""
    matrices = sum(
        module.weight.numel()
        for block in model.blocks
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(("adaLN_modulation", "cross.kv"))
    )
    pairs = 4 * model.config.dim * model.config.depth
    total = 0.0
    for phase in plan.phases:
        seen = [lengths[i] for i in (*phase.requests, *phase.guided)]
        total += len(phase.steps) * sum(2 * matrices * length + pairs * length**2 for length in seen)
    return total


def _rate(model: SoraDiT) -> float:
    """Operations a second of a product like the MLP's first."""
    weight = model.x_embedder.proj.weight
    x, y = weight.new_ones(512, model.config.dim), weight.new_ones(model.config.dim, 4 * model.config.dim)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        (x @ y)[0, 0].item()  # which waits for the device
        times.append(time.perf_counter() - began)
    return 2 * x.shape[0] * y.numel() / min(times)
