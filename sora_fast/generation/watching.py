"""From what was asked for to what a run tells while it goes on."""

from typing import IO

from sora_fast.generation.strips import SampleStrips, StripsConfig
from sora_fast.training.data import FolderSource
from sora_fast.training.options import TrainOptions
from sora_fast.training.run import LOG, RunConfig
from sora_fast.training.watchers import JsonLines, LossCurve, TensorBoard, Watcher


def watchers_of(o: TrainOptions, config: RunConfig, source: FolderSource, device: str, lines: IO[str]) -> list[Watcher]:
    """A picture of the loss always; samples, TensorBoard, and JSON on `lines`, where they are asked for."""
    watchers: list[Watcher] = [LossCurve(o.out / LOG, o.out / "loss.png")]
    if o.json:
        watchers.append(JsonLines(lines))
    if o.tensorboard:
        watchers.append(TensorBoard(o.out / "tensorboard"))
    if o.sample_every is not None:
        strips = StripsConfig(o.sample_every)
        requests = SampleStrips.of_source(source, strips)
        watchers.append(SampleStrips(config, requests, o.out / "samples", strips, device=device))
    return watchers
