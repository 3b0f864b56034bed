"""Codecs: from videos to the latents that a model denoises, and back."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentSpec:
    """What a codec's latents look like.

    channels: C of the latents; spatial_stride, temporal_stride: video pixels and frames a latent pixel and frame.
    first_frame_alone: causal codecs give the first frame a latent frame of its own, so that images are videos too.
    lead: latent frames before the first, copies of it; see IdentityCodec.
    scale, shift: latents = (raw code − shift) · scale, so that they have about unit variance, as noise does.
    """

    channels: int
    spatial_stride: int = 1
    temporal_stride: int = 1
    first_frame_alone: bool = False
    lead: int = 0
    scale: float = 1.0
    shift: float = 0.0

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a video. ValueError if the strides do not divide it."""
        alone = int(self.first_frame_alone)
        for name, size, stride in (
            ("frames", frames - alone, self.temporal_stride),
            ("height", height, self.spatial_stride),
            ("width", width, self.spatial_stride),
        ):
            if size % stride:
                rule = f"a multiple of {stride}" + (" plus 1" if alone and name == "frames" else "")
                raise ValueError(f"{name}: {size + alone * (name == 'frames')}; this codec needs {rule}")
        latent_frames = self.lead + alone + (frames - alone) // self.temporal_stride
        return self.channels, latent_frames, height // self.spatial_stride, width // self.spatial_stride


class Codec(Protocol):
    """Encodes one video (C, T, H, W), float in [−1, 1], to latents of `spec.latent_shape`, and decodes them."""

    spec: LatentSpec

    def encode(self, video: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class IdentityCodec:
    """The pixels themselves are the latents; decoding returns to the range [−1, 1].

    lead: copies of the first frame that go before it, and are dropped again. With patches of lead + 1 frames the first
        frame so has patches of its own, as causal codecs give it a latent frame of its own: an image is then a video
        of one frame, and a single image can be what a video begins with.
    """

    channels: int = 3
    lead: int = 0

    @staticmethod
    def for_patches(channels: int, patch_size: tuple[int, int, int]) -> "IdentityCodec":
        """With the lead that gives the first frame patches of its own."""
        return IdentityCodec(channels, lead=patch_size[0] - 1)

    @property
    def spec(self) -> LatentSpec:
        return LatentSpec(channels=self.channels, lead=self.lead)

    def encode(self, video: Tensor) -> Tensor:
        """video: (C, T, H, W) float in [−1, 1] → (C, lead + T, H, W)."""
        if video.ndim != 4 or video.shape[0] != self.channels:
            raise ValueError(f"video: shape {tuple(video.shape)}; it must be ({self.channels}, T, H, W)")
        if not video.is_floating_point():
            raise TypeError(f"video: {video.dtype}; it must be floating point, with values in [-1, 1]")
        return torch.cat([video[:, :1].expand(-1, self.lead, -1, -1), video], dim=1) if self.lead else video

    def decode(self, latents: Tensor) -> Tensor:
        """latents: (C, lead + T, H, W) → (C, T, H, W); what lies outside [−1, 1] is clamped."""
        return latents[:, self.lead :].clamp(-1, 1)
