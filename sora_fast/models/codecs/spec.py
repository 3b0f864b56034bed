"""What a codec's latents look like."""

from dataclasses import dataclass

import torch
from torch import Tensor

Numbers = float | tuple[float, ...]


@dataclass(frozen=True)
class LatentSpec:
    """What a codec's latents look like.

    channels: C of the latents; spatial_stride, temporal_stride: video pixels and frames a latent pixel and frame.
    first_frame_alone: causal codecs give the first frame a latent frame of its own, so that images are videos too.
    lead: latent frames before the first, copies of it; see IdentityCodec.
    mean, std: of the raw codes, one for all channels or one for each: latents = (raw code − mean) / std, so that they
        have about unit variance, as noise does.
    video_channels: of the videos; None: as many as of the latents.
    """

    channels: int
    spatial_stride: int = 1
    temporal_stride: int = 1
    first_frame_alone: bool = False
    lead: int = 0
    mean: Numbers = 0.0
    std: Numbers = 1.0
    video_channels: int | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.channels:
                raise ValueError(f"{name}: {len(value)} numbers; it must be one, or one for each of {self.channels}")
        if min(self.std if isinstance(self.std, tuple) else (self.std,)) <= 0:
            raise ValueError(f"std: {self.std}; it must be positive")

    @property
    def pixel_channels(self) -> int:
        """Of the videos."""
        return self.channels if self.video_channels is None else self.video_channels

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a video: what the strides do not divide is filled up, see padding.py."""
        for name, size in (("frames", frames), ("height", height), ("width", width)):
            if size < 1:
                raise ValueError(f"{name}: {size}; it must be at least 1")
        stride = self.spatial_stride
        return self.channels, self.latent_frames(frames), -(-height // stride), -(-width // stride)

    def latent_frames(self, frames: int) -> int:
        """That hold so many frames, from the first one on."""
        alone = int(self.first_frame_alone)
        return self.lead + alone + -(-(frames - alone) // self.temporal_stride)

    def video_shape(self, latents: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(C, T, H, W) of all that latents of this shape hold: the largest video that has such latents."""
        alone = int(self.first_frame_alone)
        frames = alone + (latents[1] - self.lead - alone) * self.temporal_stride
        return self.pixel_channels, frames, latents[2] * self.spatial_stride, latents[3] * self.spatial_stride

    def divides(self, frames: int) -> bool:
        """Whether a latent frame ends where so many frames end."""
        return (frames - self.first_frame_alone) % self.temporal_stride == 0

    def nearest(self, frames: int) -> str:
        """In words: the numbers of frames below and above this one where a latent frame ends."""
        below = frames - (frames - self.first_frame_alone) % self.temporal_stride
        return f"{below} or {below + self.temporal_stride}" if below > 0 else f"{below + self.temporal_stride}"

    def normalized(self, codes: Tensor) -> Tensor:
        """Raw codes (C, T, H, W) → latents."""
        if (self.mean, self.std) == (0.0, 1.0):
            return codes
        return (codes - _spread(self.mean, codes)) / _spread(self.std, codes)

    def raw(self, latents: Tensor) -> Tensor:
        """Latents (C, T, H, W) → raw codes."""
        if (self.mean, self.std) == (0.0, 1.0):
            return latents
        return latents * _spread(self.std, latents) + _spread(self.mean, latents)


def _spread(values: Numbers, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1, 1)
