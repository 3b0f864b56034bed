"""Samples of a run while it trains: a sheet every so many steps, of the same prompts and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sora_fast.generation.engine import Engine, take_weights
from sora_fast.generation.tasks import Request
from sora_fast.media.sheet import Strip, contact_sheet
from sora_fast.training.data.sources import FolderSource
from sora_fast.training.run import Networks, RunConfig
from sora_fast.training.watchers import Watcher

MOST = 4


@dataclass(frozen=True)
class StripsConfig:
    """every: steps from sheet to sheet. steps, guidance: of the sampler."""

    every: int
    steps: int = 20
    guidance: float = 2.0


class SampleStrips(Watcher):
    """Writes FOLDER/step-00000500.png and so on, sampled with the averaged weights. Training draws no other numbers.

    requests: what to sample, one a row; see `of_source`. The networks are there a second time while it trains.
    """

    def __init__(
        self,
        config: RunConfig,
        requests: Sequence[Request],
        folder: Path,
        strips: StripsConfig,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.requests, self.folder, self.strips = requests, folder, strips
        with torch.random.fork_rng(devices=[]):
            networks = Networks(config).to(device)
        self._weights = networks.trained()
        # What a graph keeps between two sheets would be the training's memory.
        self._engine = Engine(networks, device=device, compile=False, graph=False)

    @staticmethod
    def of_source(source: FolderSource, strips: StripsConfig) -> list[Request]:
        """Up to MOST captions of a data set, evenly spread, each at the size of its own file."""
        places = range(0, len(source), -(-len(source) // MOST))
        return [
            Request(source.captions[place], *source.shape(place)[1:], guidance=strips.guidance, seed=place)
            for place in places
        ]

    def stepped(self, step: int, weights: Mapping[str, Tensor]) -> None:
        if step % self.strips.every:
            return
        take_weights(self._weights, weights, self.folder)
        clips = self._engine.generate(self.requests, steps=self.strips.steps)
        rows = [Strip(request.prompt, clip) for request, clip in zip(self.requests, clips, strict=True)]
        contact_sheet(rows, self.folder / f"step-{step:08d}.png", scale=2)
