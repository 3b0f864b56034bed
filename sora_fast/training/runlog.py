"""log.jsonl: one line a step."""

import contextlib
import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sora_fast import files
from sora_fast.training.meter import Meter

if TYPE_CHECKING:
    from sora_fast.training.watchers import Watcher

log = logging.getLogger(__name__)


class RunLog:
    """The numbers are fetched from the device in groups, not at every step."""

    def __init__(self, path: Path, meter: Meter, watcher: "Watcher") -> None:
        """meter: what says what the steps of a group cost. watcher: told of every group of rows."""
        self.path, self._meter, self._watcher = path, meter, watcher
        self._rows: list[dict[str, Any]] = []
        self._values: list[Tensor] = []
        self._lines: list[str] = []
        self._summary = ""
        self._failed = False
        self.left_out = 0

    def add(self, loss: Tensor, norm: Tensor, row: dict[str, Any]) -> None:
        """A step's loss and norm of gradients, [] on any device, and what else is said of it."""
        self._rows.append(row)
        self._values.append(torch.stack([loss.float(), norm.float()]))

    def flush(self, seconds: float) -> str:
        """Write what was added; returns one line about it. What there is no room for is kept, and tried again."""
        if self._rows:
            self._summary = self._taken_in(seconds)
        self._write()
        return self._summary

    def _taken_in(self, seconds: float) -> str:
        values = torch.stack(self._values).tolist()
        rows = [row | {"loss": loss, "norm": norm} for row, (loss, norm) in zip(self._rows, values, strict=True)]
        cost = self._meter.read()
        rows = [row | {"seconds": seconds} | cost for row in rows]
        self._lines += [json.dumps(row) + "\n" for row in rows]
        self._watcher.logged(rows)
        self._rows, self._values = [], []
        sound = [row["loss"] for row in rows if math.isfinite(row["loss"] + row["norm"])]
        self.left_out += len(rows) - len(sound)
        loss = sum(sound) / len(sound) if sound else math.nan
        padding = sum(row["padding"] for row in rows) / len(rows)
        skipped = f", {self.left_out} steps skipped as not finite" if self.left_out else ""
        return (
            f"step {rows[-1]['step']}, loss {loss:.4f}, {cost['tokens_per_s']:,.0f} useful tokens/s, "
            f"{padding:.1%} padding, {cost['mfu']:.0%} of the peak, {cost['waiting']:.1%} waiting{skipped}"
        )

    def _write(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.writelines(self._lines)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # no half line for the next one to be glued to
            if not self._failed:
                log.warning("%s cannot be written (%s); its lines are kept and tried again", self.path, error.strerror)
            self._failed = True
            return
        self._lines, self._failed = [], False

    def cut(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run writes it anew."""
        rows = [row for row in read_log(self.path) if row["step"] <= step]
        files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl: step, loss, norm, lr, useful, padding, skipped, seconds; and of the steps that were
    written with it, what `Meter.read` says: tokens_per_s, mfu and so on.

    loss, norm: not finite where the step was left out (see guard.py). skipped: samples, not steps.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a killed run may leave half a line
            rows.append(json.loads(line))
    return rows
