import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sora_fast.training.runlog import RunLog, read_log
from sora_fast.training.watchers import Watcher


def _log(folder: Path) -> RunLog:
    meter = SimpleNamespace(read=lambda: {"tokens_per_s": 9.0, "mfu": 0.5, "waiting": 0.0})
    return RunLog(folder / "log.jsonl", meter, Watcher())  # type: ignore[arg-type]


def _add(log: RunLog, step: int, loss: float) -> None:
    log.add(torch.tensor(loss), torch.tensor(1.0), {"step": step, "useful": 5, "padding": 0.5})


def test_what_is_not_finite_is_logged_counted_and_no_part_of_the_mean(tmp_path: Path) -> None:
    log = _log(tmp_path)
    for step, loss in enumerate((2.0, math.nan, 4.0), start=1):
        _add(log, step, loss)
    said = log.flush(1.5)
    assert said.startswith("step 3, loss 3.0000, ") and said.endswith("1 steps skipped as not finite")
    assert log.left_out == 1
    rows = read_log(log.path)
    assert [row["loss"] for row in rows] == pytest.approx([2.0, math.nan, 4.0], nan_ok=True)
    assert log.flush(2.0) == said and len(read_log(log.path)) == 3


def test_what_cannot_be_written_is_kept_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "not yet"
    log = _log(folder)
    for step in (1, 2):
        _add(log, step, 1.0)
        log.flush(0.0)
    assert caplog.text.count("cannot be written") == 1
    folder.mkdir()
    _add(log, 3, 1.0)
    log.flush(0.0)
    assert [row["step"] for row in read_log(log.path)] == [1, 2, 3]


def test_cut(tmp_path: Path) -> None:
    log = _log(tmp_path)
    for step in (1, 2, 3):
        _add(log, step, 1.0)
    log.flush(0.0)
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    log.cut(2)
    assert [row["step"] for row in read_log(log.path)] == [1, 2]
