"""Tiny autoencoders of each family, of random weights, saved and loaded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_fast.models.codecs.diffusers import DiffusersCodec

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

FOUR = (8, 8, 8, 8)
BLOCKS = {
    "AutoencoderKLWan": {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4,
        "block_out_channels": FOUR,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4,
        "block_out_channels": (16, 16, 16),
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 4,
    },
    "AutoencoderKLCogVideoX": {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": FOUR,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8,
        "block_out_channels": FOUR,
        "decoder_block_out_channels": FOUR,
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
        "patch_size": 1,
        "scaling_factor": 0.7,
    },
    "AutoencoderKLMochi": {
        "latent_channels": 4,
        "encoder_block_out_channels": (32, 32, 32, 32),
        "decoder_block_out_channels": (32, 32, 32, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
        "latents_mean": (0.1, -0.2, 0.3, 0.0),
        "latents_std": (0.9, 1.1, 0.5, 2.0),
        "scaling_factor": 0.8,
    },
}


@pytest.fixture(scope="module", params=BLOCKS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    vae = getattr(diffusers, request.param)(**BLOCKS[request.param])
    if request.param == "AutoencoderKLLTXVideo":
        vae.latents_mean.uniform_(-1, 1)
        vae.latents_std.uniform_(0.5, 2)
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


def test_latents_are_those_of_their_own_pipelines(folder: Path) -> None:
    """And no frame is lost: neither of 1 + 4k nor of others; of no size."""
    codec = DiffusersCodec.load(folder)
    spec = codec.spec
    frames = 1 + spec.temporal_stride
    video = torch.rand(3, frames, 32, 32) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape == spec.latent_shape(frames, 32, 32)
    assert (latents - theirs(codec.vae, video)).abs().max() <= 1e-6 * latents.abs().max().clamp(min=1)
    codes = spec.raw(latents)
    if type(codec.vae).__name__ == "AutoencoderKLCogVideoX":  # which makes eight frames of two latent ones, not five
        codes = codes[:, [0, 1, 1]]
    with torch.no_grad():
        decoded = codec.vae.decode(codes[None]).sample[0, :, :frames].clamp(-1, 1)
    torch.testing.assert_close(codec.decode(latents, (frames, 32, 32)), decoded, rtol=0, atol=1e-6)
    odd = video[:, : frames - 1, :31, :30]
    assert codec.decode(codec.encode(odd), (frames - 1, 31, 30)).shape == odd.shape


def theirs(vae: Any, video: Tensor) -> Tensor:
    """By the code of a pipeline where it makes latents of videos; else by the inverse of what it decodes by."""
    name, options = type(vae).__name__, {"dtype": torch.float32, "device": torch.device("cpu")}
    scheduler = SimpleNamespace(add_noise=lambda latents, noise, timestep: latents, init_noise_sigma=1.0)
    pipeline = SimpleNamespace(vae=vae, scheduler=scheduler, vae_scale_factor_temporal=4, vae_scale_factor_spatial=8)
    options |= {"height": 32, "width": 32, "timestep": None, "generator": None}
    with torch.no_grad():
        if name == "AutoencoderKLWan":
            return diffusers.WanVideoToVideoPipeline.prepare_latents(pipeline, video[None], **options)[0]
        code = vae.encode(video[None]).latent_dist.mode()
        if name == "AutoencoderKLLTXVideo":
            normalize = diffusers.LTXImageToVideoPipeline._normalize_latents
            return normalize(code, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)[0]
    if name == "AutoencoderKLMochi":
        mean, std = (torch.tensor(x).view(1, 4, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
        return ((code - mean) * vae.config.scaling_factor / std)[0]
    return code[0] * vae.config.scaling_factor


def test_what_is_not_known_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKLCosmos"}))
    with pytest.raises(ValueError, match="of AutoencoderKLCosmos; it must be of one of AutoencoderKLWan"):
        DiffusersCodec.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(OSError, match="safetensors"):
        DiffusersCodec.load(tmp_path)
    with pytest.raises(TypeError, match=r"vae: torch\.float16; it must be float32 or bfloat16"):
        DiffusersCodec.load(folder, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"holds no autoencoder: there is no config\.json"):
        DiffusersCodec.load(tmp_path / "nowhere")
