"""From what was asked for to the configuration of a run: of a new one, and of one that goes on."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sora_fast.diffusion.paths import RectifiedFlow
from sora_fast.files import check_folder
from sora_fast.models import SoraDiTConfig
from sora_fast.packing import token_grid
from sora_fast.packing.order import Grid
from sora_fast.training.codec import CodecConfig
from sora_fast.training.data.batches import BatchConfig
from sora_fast.training.data.sources import DataConfig, FolderSource
from sora_fast.training.dropping import drop_rule
from sora_fast.training.options import CHANGEABLE, TrainOptions, spelled
from sora_fast.training.precision import fitting_precision
from sora_fast.training.recipe import (
    BASE_TOKENS,
    CLEAN_SHARE,
    HEAD_DIM,
    LATENT_PATCH,
    LR,
    MUON_RATIO,
    POSITION,
    POSITION_BIAS,
    PREDICTION,
    WARMUP,
    Recipe,
    recipe_for,
    rope_theta,
)
from sora_fast.training.run import RunConfig, TextConfig, TrainConfig, check_new, moved, read_run

# Static sizes of a batch that cost time even where they are not used: enough for small images, not for the worst case.
MOST_SEGMENTS, MOST_TEXT = 256, 8192
# Where nothing is said: how long a run is, and how many data workers it has at most.
MINUTES, MOST_WORKERS = 30.0, 8
# From so many steps, or minutes, a block of the model on, one graph of the model is worth its later start:
# by a factor of two to be sure (benchmarks/results/cpu/compile_scope.json).
MODEL_STEPS, MODEL_MINUTES = 250, 1.0


def new_config(o: TrainOptions, device: str) -> RunConfig:
    """All but what depends on the files (see `fitted`). ValueError if there is a run, or none can be made."""
    check_new(o.out)
    check_folder(o.out)
    recipe = recipe_for(device)
    depth = o.depth or recipe.depth
    minutes = MINUTES if o.minutes is None and o.steps is None else o.minutes
    text = TextConfig(folder=o.text_encoder, dim=recipe.text_dim, layers=recipe.text_layers)
    reads_text = recipe.reads_text or o.text_encoder is not None
    codec = CodecConfig() if o.codec is None else CodecConfig.of_folder(o.codec)
    channels, latent_channels, patch = _sizes(codec, o, recipe)
    dim = o.dim or recipe.dim
    return RunConfig(
        model=SoraDiTConfig(
            dim=dim,
            depth=depth,
            heads=_heads(o.heads, dim),
            in_channels=latent_channels,
            patch_size=patch,
            position=POSITION,
            position_bias=POSITION_BIAS,
            text_dim=text.width if reads_text else None,
            pooled_dim=text.width,
        ),
        train=TrainConfig(
            steps=o.steps,
            minutes=minutes,
            optimizer=o.optimizer,
            lr=o.lr or LR[o.optimizer],
            muon_ratio=MUON_RATIO,
            warmup=WARMUP,
            ema_decay=recipe.ema_decay if o.ema_decay is None else o.ema_decay,
            clean_share=CLEAN_SHARE,
            precision=o.precision if o.precision != "auto" else fitting_precision(torch.device(device))[0],
            compile=None if o.no_compile else "inductor",
            compile_scope=compile_scope(o.compile, device, depth, steps=o.steps, minutes=minutes),
            graph=o.graph,
            recompute=o.recompute,
            accumulate=o.accumulate,
            seed=o.seed,
            save_every=o.save_every,
            workers=data_workers(o.workers, device),
        ),
        text=text,
        path=RectifiedFlow(prediction=PREDICTION, base_tokens=BASE_TOKENS),
        data=DataConfig(o.data, o.max_frames, o.max_side, o.fps, channels, clips=o.clips),
        fps=o.fps or 8.0,
        codec=codec,
    )


def _sizes(codec: CodecConfig, o: TrainOptions, recipe: Recipe) -> tuple[int, int, Grid]:
    """Channels of the videos and of what is denoised, and the patch size."""
    if codec.folder is None:
        channels = 1 if o.grey else 3
        return channels, channels, o.patch or recipe.patch
    spec = codec.load().spec
    if o.grey and spec.pixel_channels != 1:
        raise ValueError(f"--grey: the codec in {codec.folder} is one of RGB")
    return spec.pixel_channels, spec.channels, o.patch or LATENT_PATCH


def _heads(asked: int | None, dim: int) -> int:
    heads = max(1, dim // HEAD_DIM) if asked is None else asked
    if dim % (2 * heads):
        raise ValueError(f"--heads {heads}: it must divide --dim {dim} into parts of an even width")
    return heads


def fitted(config: RunConfig, o: TrainOptions, source: FolderSource, device: str) -> RunConfig:
    """With what depends on the files: the sizes of a batch, the reach of positions, and how fast videos are.

    ValueError if a file is longer than a batch of the capacity that was asked for.
    """
    spec = config.build_codec().spec
    grids = [token_grid(spec.latent_shape(*shape[1:]), config.model.patch_size) for shape in source.shapes]
    batch = _batch_config(o, source, [math.prod(grid) for grid in grids], recipe_for(device).capacity)
    model = replace(config.model, rope_theta=rope_theta(max(map(max, grids))))
    train = replace(config.train, batch=batch)
    return replace(config, model=model, train=train, fps=source.rate or config.fps, data_fps=source.rate)


def resumed_config(o: TrainOptions, device: str) -> RunConfig:
    """What the run was made with, changed as far as it can be. ValueError if more is to be changed."""
    if fixed := sorted(o.given - {"resume", "device"} - set(CHANGEABLE)):
        raise ValueError(
            f"{spelled(fixed)}: a run keeps what it was made with; beside --resume there can be {spelled(CHANGEABLE)}"
        )
    config = read_run(o.out)
    if config.data is None:
        raise ValueError(f"{o.out} was not made by `sora-fast train`; it cannot be resumed by it")
    config = moved(config, data=o.data, text_encoder=o.text_encoder, codec=o.codec)
    if not Path(config.data.folder).is_dir():
        raise ValueError(f"{config.data.folder} is no folder; say where the run's data is now: --data FOLDER")
    changes = {name: getattr(o, name) for name in o.given & {"lr", "save_every", "recompute", "graph", "workers"}}
    if o.given & {"steps", "minutes"}:  # either takes the place of what limited the run
        changes |= {"steps": o.steps, "minutes": o.minutes}
    if "compile" in o.given:
        limits = {name: changes.get(name, getattr(config.train, name)) for name in ("steps", "minutes")}
        scope = compile_scope(o.compile, device, config.model.depth, **limits)
        changes |= {"compile": "inductor", "compile_scope": scope}
    if o.no_compile:
        changes["compile"] = None
    return replace(config, train=replace(config.train, **changes))


def data_workers(asked: int | None, device: str) -> int:
    """As many as are asked for, or as suit this machine.

    On a CPU none: the step takes all cores, and stands still while one of its threads has none. (On 2 cores the demo
    trains at 7,500 useful tokens/s with a thread that reads, and at 5,700 with a process, in three runs each in turn.)
    """
    if asked is not None:
        return asked
    if device.startswith("cpu"):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def compile_scope(asked: str, device: str, depth: int, *, steps: int | None, minutes: float | None) -> str:
    """What is compiled: as asked for, or "model" where a run on a CPU is so long that this takes less time in all."""
    if asked != "auto":
        return asked
    is_long = steps >= MODEL_STEPS * depth if minutes is None else minutes >= MODEL_MINUTES * depth
    return "model" if device.startswith("cpu") and is_long else "blocks"


def _batch_config(o: TrainOptions, source: FolderSource, lengths: Sequence[int], usual: int) -> BatchConfig:
    """As many places in a batch, for samples and for text, as the files at hand can need."""
    # A whole number of the longest: where all are alike, none of it is padding.
    capacity = o.capacity or max(lengths) * max(1, round(usual / max(lengths)))
    for path, tokens in zip(source.files, lengths, strict=True):
        if tokens > capacity:
            raise ValueError(
                f"{path} has {tokens} tokens, more than a batch of --capacity {capacity} holds; raise it, or lower "
                "--max-frames or --max-side, or use a larger --patch"
            )
    batches = o.steps and o.steps * o.accumulate  # which is what a rule counts
    drop = o.drop and drop_rule(o.drop, steps=batches, tokens=lengths)
    shortest = max(1, int(min(lengths) * (1 - drop.most if drop else 1)))
    segments = min(capacity // shortest, MOST_SEGMENTS)
    longest = max(len(caption.encode()) for caption in source.captions)
    return BatchConfig(
        capacity=capacity,
        max_segments=segments,
        text_capacity=min(segments * (longest + 2), MOST_TEXT),
        look_ahead=max(128, 2 * segments),
        caption_dropout=o.caption_dropout,
        drop=drop or None,
    )
