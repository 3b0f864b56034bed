"""From what was asked for to what a run tells while it goes on."""

from pathlib import Path
from typing import IO

from sora_fast.generation.strips import SampleStrips, StripsConfig
from sora_fast.training.data.sources import FolderSource
from sora_fast.training.options import TrainOptions
from sora_fast.training.run import LOG, RunConfig
from sora_fast.training.watchers import JsonLines, LossCurve, TensorBoard, Watcher


def watchers_of(o: TrainOptions, config: RunConfig, source: FolderSource, device: str, lines: IO[str]) -> list[Watcher]:
    """`plain_watchers`, JSON on `lines`, and samples where they are asked for."""
    watchers = plain_watchers(o.out, lines if o.json else None, tensorboard=o.tensorboard)
    if o.sample_every is not None:
        strips = StripsConfig(o.sample_every)
        requests = SampleStrips.of_source(source, strips)
        watchers.append(SampleStrips(config, requests, o.out / "samples", strips, device=device))
    return watchers


def plain_watchers(folder: Path, lines: IO[str] | None, *, tensorboard: bool) -> list[Watcher]:
    """A picture of the loss always; JSON on `lines`, and TensorBoard, where they are asked for."""
    watchers: list[Watcher] = [LossCurve(folder / LOG, folder / "loss.png")]
    if lines is not None:
        watchers.append(JsonLines(lines))
    if tensorboard:
        watchers.append(TensorBoard(folder / "tensorboard"))
    return watchers
