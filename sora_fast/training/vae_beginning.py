"""From what was asked of `sora-fast train-vae` to the configuration of a run: of a new one, and of one that goes on."""

import math
from dataclasses import replace
from pathlib import Path

from sora_fast.files import check_folder
from sora_fast.models.video_vae import TEMPORAL_STRIDE, VAEConfig
from sora_fast.training.beginning import data_workers
from sora_fast.training.data.batch import BatchConfig
from sora_fast.training.data.crops import CropConfig
from sora_fast.training.data.sources import DataConfig
from sora_fast.training.options import VAE_CHANGEABLE, VAEOptions, spelled
from sora_fast.training.recipe import VAE_LR, VAE_MUON_RATIO, VAE_WARMUP
from sora_fast.training.run import TrainConfig, check_new, read_run
from sora_fast.training.vae_run import VAERunConfig


def new_vae(o: VAEOptions, device: str) -> VAERunConfig:
    """ValueError if there is a run, or none can be made."""
    check_new(o.out)
    check_folder(o.out)
    time, height, width = o.strides
    if time != TEMPORAL_STRIDE or height != width:
        raise ValueError(f"--strides {'x'.join(map(str, o.strides))}: it must be 4x4x4 or 4x8x8")
    channels = 1 if o.grey else 3
    crops = CropConfig(stride=height, max_frames=o.max_frames, max_side=o.crop)
    return VAERunConfig(
        model=VAEConfig(video_channels=channels, channels=o.channels, spatial_stride=height),
        train=train_config(
            crops,
            steps=o.steps,
            minutes=30.0 if o.minutes is None and o.steps is None else o.minutes,
            capacity=o.capacity or largest(crops) * (1 if device.startswith("cpu") else 8),
            lr=o.lr or VAE_LR,
            ema_decay=o.ema_decay,
            precision=o.precision,
            save_every=o.save_every,
            seed=o.seed,
            workers=data_workers(o.workers, device),
        ),
        kl=o.kl,
        absolute=o.absolute,
        crops=crops,
        data=DataConfig(o.data, o.max_frames, o.max_side, o.fps, channels, clips=o.clips),
    )


def train_config(crops: CropConfig, *, capacity: int, **options: object) -> TrainConfig:
    """How an autoencoder is trained. capacity: latent pixels a step. ValueError if a crop has more."""
    if largest(crops) > capacity:
        raise ValueError(
            f"--capacity {capacity}: a crop has up to {largest(crops)} latent pixels; raise it, or lower --crop or "
            "--max-frames"
        )
    batch = BatchConfig(capacity=capacity, max_segments=max(32, capacity // 16), order="raster")
    recipe = {"lr": VAE_LR, "muon_ratio": VAE_MUON_RATIO, "warmup": VAE_WARMUP, "ema_decay": 0.995}
    return TrainConfig(batch=batch, optimizer="muon", compile=None, **{**recipe, **options})


def largest(crops: CropConfig) -> int:
    """Latent pixels of the largest crop."""
    side = max(crops.max_side // crops.stride, 1)
    return (1 + math.ceil((crops.max_frames - 1) / TEMPORAL_STRIDE)) * side**2


def resumed_vae(o: VAEOptions) -> VAERunConfig:
    """What the run was made with, changed as far as it can be. ValueError if more is to be changed."""
    if fixed := sorted(o.given - {"resume", "device"} - set(VAE_CHANGEABLE)):
        raise ValueError(
            f"{spelled(fixed)}: a run keeps what it was made with; beside --resume there can be "
            f"{spelled(VAE_CHANGEABLE)}"
        )
    config = read_run(o.out, VAERunConfig)
    if config.data is None:
        raise ValueError(f"{o.out} was not made by `sora-fast train-vae`; it cannot be resumed by it")
    if o.data is not None:
        config = replace(config, data=replace(config.data, folder=o.data))
    if not Path(config.data.folder).is_dir():
        raise ValueError(f"{config.data.folder} is no folder; say where the run's data is now: --data FOLDER")
    changes = {name: getattr(o, name) for name in o.given & {"lr", "save_every", "workers"}}
    if o.given & {"steps", "minutes"}:  # either takes the place of what limited the run
        changes |= {"steps": o.steps, "minutes": o.minutes}
    return replace(config, train=replace(config.train, **changes))
