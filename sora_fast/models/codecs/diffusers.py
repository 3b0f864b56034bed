"""Other people's video autoencoders, from a folder, through diffusers."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_fast.models.codecs.codec import Codec
from sora_fast.models.codecs.padding import Padded
from sora_fast.models.codecs.spec import LatentSpec

# All of them give the first frame a latent frame of its own. Of others nobody has looked at the normalisation: that of
# Cosmos (1), whose mean and deviation differ from frame to frame and whose scale is its scheduler's, fits none of this.
FAMILIES = (
    "AutoencoderKLWan",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLMochi",
)


class DiffusersCodec(Codec):
    """One of FAMILIES: Wan 2.1 and 2.2, HunyuanVideo and 1.5, CogVideoX, LTX, Mochi.

    vae: of diffusers, in float32 or bfloat16. Latents are the distribution's mode, normalised as the family's own
    pipelines do, by what its configuration (LTX: its weights) says. A video goes through it whole, one after the other;
    `vae.enable_tiling()` and `vae.enable_slicing()` do what they do there.
    """

    def __init__(self, vae: Any) -> None:
        if (name := type(vae).__name__) not in FAMILIES:
            raise ValueError(f"vae: {name}; it must be one of {', '.join(FAMILIES)}")
        if vae.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"vae: {vae.dtype}; it must be float32 or bfloat16, whose range does not overflow")
        if getattr(vae.config, "timestep_conditioning", False):
            raise ValueError("vae: its decoder is told a noise level (timestep_conditioning), which nothing here has")
        self.vae = vae.eval().requires_grad_(False)
        self._spec = spec_of(vae)

    @staticmethod
    def load(
        folder: Path | str, *, dtype: torch.dtype = torch.float32, tiling: bool = False, slicing: bool = False
    ) -> "DiffusersCodec":
        """From a folder with config.json and safetensors; nothing is fetched, and nothing unpickled.

        ValueError if it is another model's, OSError if there are no safetensors; ModuleNotFoundError without diffusers.
        """
        import diffusers

        config = Path(folder) / "config.json"
        if not config.is_file():
            raise ValueError(f"{folder} holds no autoencoder: there is no config.json in it")
        name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
        if name not in FAMILIES:
            raise ValueError(f"{config}: of {name}; it must be of one of {', '.join(FAMILIES)}")
        vae = getattr(diffusers, name).from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, torch_dtype=dtype
        )
        if tiling:
            vae.enable_tiling()
        if slicing:
            vae.enable_slicing()
        return DiffusersCodec(vae)

    @property
    def spec(self) -> LatentSpec:
        return self._spec

    @torch.no_grad()
    def _encoded(self, videos: Sequence[Padded]) -> list[Tensor]:
        latents = []
        for padded in videos:
            shape = self.spec.latent_shape(padded.video.shape[1], padded.height, padded.width)
            frames = padded.frames(0, self.spec.video_shape(shape)[1])[None]
            self.vae.to(frames.device)
            codes = self.vae.encode(frames.to(self.vae.dtype)).latent_dist.mode()
            latents.append(self.spec.normalized(codes[0].float()))
        return latents

    def _decoded(self, latents: Sequence[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
        for number, one in enumerate(latents):
            self.vae.to(one.device)
            with torch.no_grad():
                frames = self.vae.decode(self._whole(self.spec.raw(one))[None].to(self.vae.dtype)).sample
            yield number, 0, frames[0].float()

    def _whole(self, codes: Tensor) -> Tensor:
        """Of an even number of latent frames CogVideoX decodes the first one as four: its last is given twice, then."""
        even = type(self.vae).__name__ == "AutoencoderKLCogVideoX" and codes.shape[1] % 2 == 0
        return torch.cat([codes, codes[:, -1:]], dim=1) if even else codes


def spec_of(vae: Any) -> LatentSpec:
    """Latents are (code − mean) · scaling / std, with what of that a configuration has."""
    c = vae.config
    spatial, temporal = _strides(vae)
    buffers = {name: buffer.tolist() for name, buffer in vae.named_buffers() if name in ("latents_mean", "latents_std")}
    mean, std = (buffers.get(name, getattr(c, name, None)) for name in ("latents_mean", "latents_std"))
    scaling = getattr(c, "scaling_factor", None) or 1.0
    channels = getattr(c, "z_dim", None) or c.latent_channels
    return LatentSpec(
        channels,
        spatial,
        temporal,
        first_frame_alone=True,
        mean=(getattr(c, "shift_factor", None) or 0.0) if mean is None else tuple(mean),
        std=1 / scaling if std is None else tuple(value / scaling for value in std),
        video_channels=3,
    )


def _strides(vae: Any) -> tuple[int, int]:
    """Pixels and frames a latent: under other names in each family."""
    c = vae.config
    if hasattr(c, "scale_factor_spatial"):  # Wan
        return c.scale_factor_spatial, c.scale_factor_temporal
    if type(vae).__name__ == "AutoencoderKLCogVideoX":
        return 2 ** (len(c.block_out_channels) - 1), int(c.temporal_compression_ratio)
    return int(vae.spatial_compression_ratio), int(vae.temporal_compression_ratio)
