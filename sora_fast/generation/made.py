"""What was sampled, and becomes frames as they are asked for."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_fast.models.codecs import Codec


@dataclass(frozen=True, eq=False)
class Made:
    """A video as latents (C, T, H, W). size: (T, H, W) of its frames."""

    codec: Codec
    latents: Tensor
    size: tuple[int, int, int]

    @torch.no_grad()
    def video(self) -> Tensor:
        """(C, T, H, W), float in [-1, 1] on the CPU."""
        return self.codec.decode(self.latents, self.size).cpu()

    def pieces(self) -> Iterator[Tensor]:
        """The same, some frames (C, t, H, W) at a time: no more of them are in memory than the codec makes at once."""
        for piece in self.codec.stream(self.latents, self.size):
            yield piece.cpu()
