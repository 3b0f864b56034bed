"""What a run of `sora-fast train-vae` is, and the codec that it makes.

RUN/config.json       VAERunConfig
RUN/log.jsonl, RUN/checkpoints/…   as of any run; "latents" in a checkpoint: the mean and deviation of each channel
"""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

from sora_fast.models.codecs.vae import VAECodec
from sora_fast.models.video_vae import CausalVideoVAE, VAEConfig
from sora_fast.training import checkpoint
from sora_fast.training.data.crops import CropConfig
from sora_fast.training.data.sources import DataConfig
from sora_fast.training.run import CHECKPOINTS, TrainConfig, located, read_run

# Of the network's weights in a checkpoint, behind which stand their own names.
WEIGHTS = "vae."


@dataclass(frozen=True)
class VAERunConfig:
    """What `config.json` holds in the folder of a run of `sora-fast train-vae`.

    kl, absolute: weights of the divergence from noise, of a latent number, and of the absolute error, beside the square
        of the error of a pixel. (Four minutes of the demo's digits on one core, at rates that were not alike: 24.2 dB
        by squares, 21.2 dB by absolute errors in their place, which first make all as black as most of it is.)
    crops: the parts of videos that are trained on. data: as of any run.
    """

    model: VAEConfig
    train: TrainConfig
    kl: float = 1e-5
    absolute: float = 0.0
    crops: CropConfig = field(default_factory=CropConfig)
    data: DataConfig | None = None

    FIXED: ClassVar = ("model", "kl", "absolute", "crops", "data")

    def __post_init__(self) -> None:
        if self.crops.stride != self.model.spatial_stride:
            raise ValueError(f"crops.stride: {self.crops.stride}; it must be {self.model.spatial_stride}, the model's")
        if self.train.compile is not None or self.train.graph or self.train.recompute:
            raise ValueError("train: compile, graph and recompute are not for an autoencoder, whose sizes change")
        for name in ("kl", "absolute"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}; it must not be negative")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """That are computed in, the main one first."""
        return (torch.bfloat16, torch.float32) if self.train.precision == "bfloat16" else (torch.float32,)

    def located(self) -> "VAERunConfig":
        """With a folder that is found from anywhere."""
        return replace(self, data=located(self.data))

    def anywhere(self) -> "VAERunConfig":
        """Without what its folder may differ in."""
        return self if self.data is None else replace(self, data=replace(self.data, folder=""))

    def check_folders(self, before: "VAERunConfig") -> None:
        """The data are compared where they are read."""


def load_vae(folder: Path | str) -> VAECodec:
    """The codec that a run has made so far: its newest averaged weights. ValueError if there is none."""
    config = read_run(Path(folder), VAERunConfig)
    saved = _newest(Path(folder))
    network = CausalVideoVAE(config.model)
    network.load_state_dict({name.removeprefix(WEIGHTS): weight for name, weight in saved.tensors["ema"].items()})
    mean, std = (tuple(saved.tensors["latents"][name].tolist()) for name in ("mean", "std"))
    return VAECodec(network, mean=mean, std=std)


def fingerprint(folder: Path) -> str:
    """A hash of what `load_vae` loads; ValueError as there."""
    digest, saved = hashlib.sha256(), _newest(folder)
    for group in ("ema", "latents"):
        for name, tensor in sorted(saved.tensors[group].items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _newest(folder: Path) -> checkpoint.Checkpoint:
    read_run(folder, VAERunConfig)
    saved = checkpoint.latest(folder / CHECKPOINTS, groups=("ema", "latents"))
    if saved is None:
        raise ValueError(f"{folder} holds no checkpoint yet; train it first")
    return saved
