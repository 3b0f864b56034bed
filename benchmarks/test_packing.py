"""Padding, buckets and packing on the same data sets, model and token budget; and what a token costs in longer videos.

One round of `test_packing` is a forward and backward pass of SoraDiT over batches of a fixed number of *useful* tokens
(see benchmarks/packing.py), so that times compare. Each way is granted what is usual for it: padded and bucketed
batches are computed at their own size, a pack always at its capacity; padding is tokens like all others, which is what
it costs under a key-padding mask. Making the batches is not timed (test_packer.py does that): loaders work ahead.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.nvml import Gauge
from benchmarks.packing import MIXES, WAYS, Batch, Buckets, Grid, Mix, Tally
from sora_fast import use_backend
from sora_fast.diffusion import RectifiedFlow, training_loss
from sora_fast.masks import SpacetimeMask
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.packing import PackedLayout, RaggedLatents

CHANNELS, PATCH = 16, (1, 2, 2)
FRAME = (16, 16)  # tokens of a frame of the videos that grow longer
MASKS = {
    "full": SpacetimeMask.full(),
    "frame-causal": SpacetimeMask.frame_causal(),
    "spatial": SpacetimeMask.spatial(),
    "temporal": SpacetimeMask.temporal(),
    "window": SpacetimeMask.window(2, 4, 4),
}
COUNTS = tuple(1024 * 2**power for power in range(8))  # 1k … 128k
# A curve ends after the first count whose step takes so many seconds.
SLOW = 3.0

Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """How much is computed where: DiT-S in bf16 on a GPU, two blocks of it in fp32 on a CPU, as blocks cost the same.

    budget: tokens of a batch; useful: of a round; area, frames: how many times larger and longer samples are made;
    samples: of a data set, which the tally is of, while a round computes a part of it.
    """

    device: torch.device
    backend: str
    depth: int
    budget: int
    useful: int
    area: int = 1
    frames: int = 1
    samples: int = 20_000

    @staticmethod
    def here() -> "Setting":
        if torch.cuda.is_available():
            return Setting(torch.device("cuda"), "triton", 12, 32_768, 520_000, area=4, frames=2)
        return Setting(torch.device("cpu"), "torch", 2, 4096, 24_300)

    def batches(self, mix: Mix, way: str) -> tuple[list[Batch], Tally]:
        """Random batches for a round, and the tally of all.

        As many as hold `self.useful` tokens on average. Of many draws the one that comes nearest to that number, so
        that all ways do the same work, and to the padding of all batches, so that none is lucky.
        """
        grids = mix.scaled(self.area, self.frames).draw(self.samples, longest=self.budget)
        batches = list(WAYS[way](grids, self.budget, Buckets().scaled(self.area, self.frames)))
        tally = Tally.of(batches, grids)
        count = max(1, round(self.useful * len(batches) / _useful(batches)))

        def distance(draw: list[Batch]) -> float:
            useful = _useful(draw)
            padding = 1 - useful / sum(batch.capacity for batch in draw)
            return max(abs(useful / self.useful - 1), abs(padding - tally.padding))

        return min((random.Random(seed).sample(batches, count) for seed in range(500)), key=distance), tally

    def model(self, mask: SpacetimeMask) -> SoraDiT:
        torch.manual_seed(0)
        config = SoraDiTConfig(384, self.depth, 6, CHANNELS, PATCH, mask=mask)
        return SoraDiT(config).to(self.device)

    def step(self, model: SoraDiT, layout: PackedLayout, grids: tuple[Grid, ...]) -> Step:
        """A forward and backward pass over random latents of `grids`, as the trainer has it."""
        videos = [torch.randn(CHANNELS, *(n * p for n, p in zip(grid, PATCH, strict=True))) for grid in grids]
        elements = layout.capacity * CHANNELS * math.prod(PATCH)
        latents = RaggedLatents.from_list(videos, capacity=elements, max_segments=layout.max_segments).to(self.device)
        noise, sigma = torch.randn_like(latents.flat), torch.rand(layout.max_segments, device=self.device)
        layout, on_gpu = layout.to(self.device), self.device.type == "cuda"

        def run() -> None:
            model.zero_grad()
            with use_backend(self.backend), torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu):
                loss = training_loss(model, latents, layout, RectifiedFlow(), sigma, noise=noise, patch_size=PATCH)
            loss.backward()

        return run

    def work(self, *steps: Step) -> None:
        """All steps, to their end."""
        for step in steps:
            step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _useful(batches: Sequence[Batch]) -> int:
    return sum(batch.useful for batch in batches)


SETTING = Setting.here()
_last: dict[str, float] = {}  # seconds of the last step of a curve


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.name)
def test_packing(benchmark: Any, mix: Mix, way: str) -> None:
    batches, tally = SETTING.batches(mix, way)
    model, steps = SETTING.model(MASKS["full"]), []
    for batch in batches:
        layout = PackedLayout.from_grids(batch.grids, capacity=batch.capacity)
        steps.append(SETTING.step(model, layout, batch.grids))
    SETTING.work(steps[0])
    benchmark.group = f"packing[{mix.name}]"
    benchmark.pedantic(SETTING.work, steps, rounds=3)
    useful, computed = _useful(batches), sum(batch.capacity for batch in batches)
    benchmark.extra_info |= {"op": "packing", "case": mix.name, "direction": "forward and backward", "backend": way}
    benchmark.extra_info |= {"series": mix.name, "tokens": useful, "steps": len(steps), **asdict(tally)}
    if benchmark.enabled:
        seconds = benchmark.stats.stats.median
        rates = {"useful_tokens_per_second": useful / seconds, "computed_tokens_per_second": computed / seconds}
        benchmark.extra_info |= rates


@pytest.mark.parametrize("tokens", COUNTS)
@pytest.mark.parametrize("mask", MASKS)
def test_longer_videos(benchmark: Any, mask: str, tokens: int) -> None:
    """One video of ever more frames of 16 × 16 tokens."""
    if _last.get(mask, 0) > SLOW:
        pytest.skip(f"half as many tokens took {_last[mask]:.0f} s")
    grids = ((tokens // math.prod(FRAME), *FRAME),)
    model = SETTING.model(MASKS[mask])
    layout = PackedLayout.from_grids(grids, order="tiled", for_mask=MASKS[mask])
    step = SETTING.step(model, layout, grids)
    kept = kept_bytes(step, model)
    benchmark.group = f"longer videos[{mask}]"
    benchmark.pedantic(SETTING.work, [step], rounds=3)
    benchmark.extra_info |= {"op": "longer_videos", "case": f"{mask}, {tokens} tokens", "series": mask}
    benchmark.extra_info |= {"direction": "forward and backward", "backend": SETTING.backend, "tokens": tokens}
    benchmark.extra_info["kept_bytes_per_token"] = kept / tokens
    if benchmark.enabled:
        _last[mask] = benchmark.stats.stats.median
        benchmark.extra_info["ns_per_token"] = 1e9 * _last[mask] / tokens
        if SETTING.device.type == "cuda":
            benchmark.extra_info |= Gauge(SETTING.device).read(step, 1e3 * _last[mask])


def kept_bytes(step: Step, model: SoraDiT) -> int:
    """What the forward pass keeps for the backward one, in bytes, beside the model's weights."""
    # None of them is freed before the backward pass, so no address is met twice.
    storages = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(storages.values())
