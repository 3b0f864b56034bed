"""From a planned pack to its tensors: read, decoded, encoded, laid out. What worker processes do."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from sora_fast.models.codecs import Codec, UnfitFrames
from sora_fast.packing import PackedLayout, RaggedLatents, token_grid
from sora_fast.packing.order import Grid
from sora_fast.training.data.batch import Batch, BatchConfig
from sora_fast.training.data.plan import CAPTION, CLIP, KEEP, Pack
from sora_fast.training.data.sources import Sample, Source, UnusableSample, sample_name


class Made(NamedTuple):
    """batch: without prompts; captions: of its samples, in order.

    lost: names of samples that could not be used, with the reason; notes: of those that were, but not as expected.
    """

    batch: Batch
    captions: list[str]
    lost: dict[str, str]
    notes: dict[str, str]


class _Encoded(NamedTuple):
    """keep: raster indices of the tokens that stay; None: all."""

    video: Tensor
    caption: str
    grid: Grid
    keep: np.ndarray | None

    @property
    def tokens(self) -> int:
        return math.prod(self.grid) if self.keep is None else len(self.keep)


@dataclass(frozen=True)
class Maker:
    """Makes batches of packs; the same one of the same pack, in whatever process.

    The arguments are those of `Batches`. If the source has a method `draw(index, random)`, that gives the samples, at
    random but always the same for a position of the stream.
    """

    source: Source
    config: BatchConfig
    codec: Codec
    patch_size: Grid
    seed: int

    def make(
        self, pack: Pack, *, without: Collection[str] = (), at: Callable[[int], None] = lambda index: None
    ) -> Made:
        """without: names of samples that are not touched. at: told of each sample before it is read."""
        c, lost, notes = self.config, {}, {}
        encoded = list(self._encoded(pack, without, at, lost, notes))
        # Equal lengths side by side: on a CPU they share one call of attention.
        encoded.sort(key=lambda item: item.tokens)
        videos, grids = [item.video for item in encoded], [item.grid for item in encoded]
        keep = None if pack.kept is None else [item.keep for item in encoded]
        elements = c.pixel_capacity * self.codec.spec.channels * math.prod(self.patch_size)
        batch = Batch(
            RaggedLatents.from_list(videos, capacity=elements, max_segments=c.max_segments),
            PackedLayout.from_grids(grids, order=c.order, capacity=c.capacity, max_segments=c.max_segments, keep=keep),
            None,
            useful=sum(item.tokens for item in encoded),
            skipped=pack.skipped,
            resume=pack.resume,
        )
        return Made(batch, [item.caption for item in encoded], lost, notes)

    def _encoded(
        self,
        pack: Pack,
        without: Collection[str],
        at: Callable[[int], None],
        lost: dict[str, str],
        notes: dict[str, str],
    ) -> Iterator[_Encoded]:
        kept = pack.kept or (None,) * len(pack.positions)
        for position, index, count in zip(pack.positions, pack.indices, kept, strict=True):
            if (name := sample_name(self.source, index)) in without or name in lost:
                continue
            at(index)
            try:
                sample = self._sample(position, index)
                video = self.codec.encode(sample.video)
            except (UnusableSample, UnfitFrames) as error:
                lost[name] = str(error)
                continue
            if sample.note:
                notes[name] = sample.note
            grid = token_grid(video.shape, self.patch_size)
            keep = None if count is None else self._keep(position, math.prod(grid), count)
            yield _Encoded(video, self._caption(sample, position), grid, keep)

    def _keep(self, position: int, tokens: int, count: int) -> np.ndarray:
        """The tokens of a sample that stay; all, if it has fewer than it was planned to keep."""
        random = np.random.default_rng((self.seed, KEEP, position))
        return np.sort(random.choice(tokens, size=min(count, tokens), replace=False, shuffle=False))

    def _sample(self, position: int, index: int) -> Sample:
        if hasattr(self.source, "draw"):
            return self.source.draw(index, np.random.default_rng((self.seed, CLIP, position)))
        return self.source[index]

    def _caption(self, sample: Sample, position: int) -> str:
        dropped = np.random.default_rng((self.seed, CAPTION, position)).random()
        return "" if dropped < self.config.caption_dropout else sample.caption
