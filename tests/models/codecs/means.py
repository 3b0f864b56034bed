"""A codec that one can look through: what tests of the contract are made with."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sora_fast.models.codecs import Codec, LatentSpec
from sora_fast.models.codecs.padding import Padded


class Means(Codec):
    """Causal, 4×2×2: a latent is the mean of its pixels; the first frame has latents of its own. Decoding repeats."""

    spec = LatentSpec(1, 2, 4, first_frame_alone=True, mean=(0.5,), std=(2.0,))

    def _encoded(self, videos: Sequence[Padded]) -> list[Tensor]:
        return [self._mean(padded) for padded in videos]

    def _mean(self, padded: Padded) -> Tensor:
        latent_frames = self.spec.latent_frames(padded.video.shape[1])
        frames = padded.frames(-3, 4 * latent_frames - 3)
        return self.spec.normalized(torch.nn.functional.avg_pool3d(frames, (4, 2, 2)))

    def _decoded(self, latents: Sequence[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
        for number, code in enumerate(map(self.spec.raw, latents)):
            frames = code.repeat_interleave(2, 2).repeat_interleave(2, 3)
            yield number, 0, frames[:, :1]
            for time in range(1, frames.shape[1]):
                yield number, 4 * time - 3, frames[:, time : time + 1].expand(-1, 4, -1, -1)
