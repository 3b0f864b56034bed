"""What is told of a run while it goes on, beside its log: lines of JSON, TensorBoard, a picture of the loss."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from sora_fast.training.runlog import read_log

log = logging.getLogger(__name__)

Row = Mapping[str, Any]


class Watcher:
    """Is told what happens; none of it changes the run. What a watcher does not care for it leaves as it is here."""

    def logged(self, rows: Sequence[Row]) -> None:
        """These rows were added to the log (see `runlog.read_log`)."""

    def stepped(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """So many steps are done; the averaged weights, by name, are still the trainer's own: to be read at once."""

    def ended(self) -> None:
        """The run is at its end or was stopped, and is saved."""


class Watchers(Watcher):
    """All of them as one. What one cannot write, on a full disk perhaps, is said and stops nobody."""

    def __init__(self, watchers: Sequence[Watcher] = ()) -> None:
        self._watchers = watchers

    def logged(self, rows: Sequence[Row]) -> None:
        self._tell(lambda watcher: watcher.logged(rows))

    def stepped(self, step: int, weights: Mapping[str, Tensor]) -> None:
        self._tell(lambda watcher: watcher.stepped(step, weights))

    def ended(self) -> None:
        self._tell(lambda watcher: watcher.ended())

    def _tell(self, what: Callable[[Watcher], None]) -> None:
        for watcher in self._watchers:
            try:
                what(watcher)
            except OSError as error:
                log.warning("%s: %s; training goes on", type(watcher).__name__, error)


class JsonLines(Watcher):
    """Writes every row to a stream, a line each."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def logged(self, rows: Sequence[Row]) -> None:
        self._stream.writelines(json.dumps(dict(row)) + "\n" for row in rows)
        self._stream.flush()


class TensorBoard(Watcher):
    """Writes every number of every row for TensorBoard. ModuleNotFoundError where that is not installed."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def logged(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                    self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def ended(self) -> None:
        self._writer.close()


class LossCurve(Watcher):
    """Draws the loss of the whole run, resumed or not, from its log; where matplotlib is missing it says so."""

    def __init__(self, log_file: Path, picture: Path) -> None:
        self._log_file, self._picture = log_file, picture

    def ended(self) -> None:
        try:
            from sora_fast.training.curve import loss_curve
        except ImportError:
            log.warning("%s is not drawn: that needs matplotlib", self._picture)
            return
        if rows := read_log(self._log_file):
            columns = {name: [row[name] for row in rows] for name in ("loss", "step", "seconds")}
            loss_curve(columns["loss"], self._picture, steps=columns["step"], seconds=columns["seconds"])
