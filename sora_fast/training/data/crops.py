"""Parts of videos, of random lengths, sizes and places: what a video autoencoder is trained on."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sora_fast.models.codecs.padding import Padded
from sora_fast.training.data.plan import CLIP
from sora_fast.training.data.sources import Sample, Source, sample_name


@dataclass(frozen=True)
class CropConfig:
    """How large they are: 1 + 4k frames, and sides that `stride` divides.

    max_frames, max_side: at the most. min_side: at the least, where a video has as much.
    """

    stride: int = 4
    max_frames: int = 17
    max_side: int = 64
    min_side: int = 16


def crops_of(source: Source, config: CropConfig, seed: int) -> "Crops":
    """A source of one part of each sample: of the same length and size every time, but not in the same place.

    What is shorter is filled up by copies of the last frame, row or column, as the codec will fill it up: a video of
    two to four frames is one of five.
    """
    return (SizedCrops if hasattr(source, "__len__") else Crops)(source, config, seed)


class Crops:
    """See `crops_of`."""

    def __init__(self, source: Source, config: CropConfig, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed
        self.fingerprint = getattr(source, "fingerprint", None)

    def __getitem__(self, index: int) -> Sample:
        return self.draw(index, np.random.default_rng((self.seed, CLIP, index)))

    def draw(self, index: int, random: np.random.Generator) -> Sample:
        """A part of the sample, where `random` says; of a source that draws clips, of any of them."""
        sample = self.source.draw(index, random) if hasattr(self.source, "draw") else self.source[index]
        padded = Padded.to_strides(sample.video, self.config.stride)
        frames, height, width = self._size(index, sample.video.shape)
        room = zip(sample.video.shape[1:], (frames, height, width), strict=True)
        time, top, left = (int(random.integers(max(0, whole - part) + 1)) for whole, part in room)
        part = padded.frames(time, time + frames, slice(top, top + height), slice(left, left + width))
        return Sample(part.contiguous(), note=sample.note)

    def shape(self, index: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a sample's part."""
        known = self.source.shape(index) if hasattr(self.source, "shape") else self.source[index].video.shape
        return known[0], *self._size(index, known)

    def name(self, index: int) -> str:
        """That of the sample."""
        return sample_name(self.source, index)

    def divided(self, parts: int) -> "Crops":
        """For one of several processes."""
        source = self.source.divided(parts) if hasattr(self.source, "divided") else self.source
        return crops_of(source, self.config, self.seed)

    def _size(self, index: int, shape: Any) -> tuple[int, int, int]:
        c, random = self.config, np.random.default_rng((self.seed, index))
        steps = min(-(-(shape[1] - 1) // 4), (c.max_frames - 1) // 4)
        height, width = (self._side(random, side) for side in shape[2:])
        return 1 + 4 * int(random.integers(steps + 1)), height, width

    def _side(self, random: np.random.Generator, side: int) -> int:
        c = self.config
        most = max(1, min(side, c.max_side) // c.stride)
        least = min(most, -(-c.min_side // c.stride))
        return c.stride * int(random.integers(least, most + 1))


class SizedCrops(Crops):
    """Of a data set."""

    def __len__(self) -> int:
        return len(self.source)
