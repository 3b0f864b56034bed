"""What the data costs: frames a second that arrive in batches, and the share of its time that a training step waits.

The clips are H.264 as x264 makes it by default, a keyframe every 250 frames at most: a clip from the middle takes the
decoding of all frames since. Read again at every visit: the frames of long videos are kept nowhere.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from sora_fast.demo.digits import MovingDigits
from sora_fast.demo.run import FULL, run_config
from sora_fast.models import SoraDiTConfig
from sora_fast.models.codecs import IdentityCodec
from sora_fast.training.data.batches import BatchConfig, Batches
from sora_fast.training.data.prefetch import prefetch
from sora_fast.training.data.sources import DataConfig, FolderSource, Source
from sora_fast.training.interruption import Interruption
from sora_fast.training.run import RunConfig, TextConfig, TrainConfig
from sora_fast.training.trainer import Trainer

VIDEOS, FRAMES, SIDE, CLIP = 4, 240, 256, 16
PATCH = (2, 16, 16)
# Two clips of 2,048 tokens each.
BATCH = BatchConfig(capacity=4096, max_segments=8, text_capacity=1024, look_ahead=16)
STEPS, WARMUP = 6, 2


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    """Waves that move, under grain, which keeps the decoder as busy as a camera's."""
    folder = tmp_path_factory.mktemp("clips")
    y, x = np.mgrid[:SIDE, :SIDE] / 20
    for number in range(VIDEOS):
        random = np.random.default_rng(number)
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.width = stream.height = SIDE
            for moment in range(FRAMES):
                waves = np.stack([np.sin(x + moment / 9 + c) * np.cos(y - moment / (5 + c)) for c in range(3)], -1)
                grain = random.integers(-12, 12, size=(SIDE, SIDE, 1))
                pixels = (127 + 100 * waves + grain).clip(0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    return FolderSource(DataConfig(str(folder), max_frames=CLIP, max_side=SIDE, clips="anywhere"))


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_frames_a_second(benchmark: Any, clips: FolderSource, workers: int) -> None:
    """Nothing else runs: as many packs as the processes make. 0: one thread."""
    batches = Batches(clips, BATCH, patch_size=PATCH, codec=IdentityCodec(lead=PATCH[0] - 1), workers=workers)
    packs = 12
    with contextlib.closing(iter(batches)) as items:
        next(items)  # the processes are there

        def take() -> int:
            return sum(len(batch.latents.to_list()) for batch in itertools.islice(items, packs))

        samples = benchmark.pedantic(take, rounds=3)
    benchmark.group = "frames of H.264 clips"
    benchmark.extra_info.update(workers=workers, frames=CLIP * samples)
    if benchmark.enabled:
        benchmark.extra_info["frames_per_s"] = CLIP * samples / benchmark.stats.stats.median


def _on_clips(clips: FolderSource) -> tuple[RunConfig, Source]:
    model = SoraDiTConfig(dim=256, depth=6, heads=4, in_channels=3, patch_size=PATCH, text_dim=128, pooled_dim=128)
    train = TrainConfig(steps=STEPS + WARMUP, batch=BATCH, compile=None)  # which here would take longer than the steps
    return RunConfig(model=model, train=train, text=TextConfig()), clips


def _on_digits() -> tuple[RunConfig, Source]:
    config = run_config(FULL, seed=0, workers=1)
    return replace(config, train=replace(config.train, steps=60 + WARMUP, minutes=None)), MovingDigits(seed=0)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("mix", ["digits", "clips"])
def test_wait(benchmark: Any, clips: FolderSource, tmp_path: Path, mix: str, workers: int) -> None:
    """Trains for real. Beside the waiting: what a step takes while the data is made, and with batches made before."""
    config, source = _on_digits() if mix == "digits" else _on_clips(clips)
    trainer = Trainer(
        replace(config, train=replace(config.train, workers=workers, log_every=10_000)), source, tmp_path / "run"
    )
    steps, waits = _train(trainer, trainer._prefetched())
    with contextlib.closing(prefetch(iter(trainer.batches))) as batches:
        ready = list(itertools.islice(batches, len(steps)))
    alone, _ = _train(trainer, iter(ready))
    benchmark.pedantic(lambda: None)
    benchmark.group = "share of time that a step waits for data"
    benchmark.extra_info.update(mix=mix, workers=workers, steps=len(steps), threads=torch.get_num_threads())
    benchmark.extra_info["step_s"] = sum(steps) / len(steps)
    benchmark.extra_info["step_with_batches_made_before_s"] = sum(alone) / len(alone)
    benchmark.extra_info["wait_share"] = sum(waits) / sum(steps)


def _train(trainer: Trainer, batches: Iterator[Any]) -> tuple[list[float], list[float]]:
    """Seconds of each step after the first few, and those of them that it waited for its batch."""
    steps, waits, interruption = [], [], Interruption()
    for _ in range(trainer.config.steps):
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        came = time.perf_counter()
        trainer._train_on([batch], 0.5, interruption)
        steps.append(time.perf_counter() - began)
        waits.append(came - began)
    getattr(batches, "close", lambda: None)()
    return steps[WARMUP:], waits[WARMUP:]
