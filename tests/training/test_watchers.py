import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sora_fast.training.watchers import JsonLines, LossCurve, TensorBoard, Watcher, Watchers

ROWS = [{"step": 3, "loss": 0.5, "seconds": 1.0}, {"step": 4, "loss": math.nan, "seconds": 2.0}]


def test_lines_are_json_each() -> None:
    stream = io.StringIO()
    JsonLines(stream).logged(ROWS[:1])
    assert json.loads(stream.getvalue()) == ROWS[0] and stream.getvalue().endswith("\n")


def test_what_cannot_be_written_is_said_and_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Full(Watcher):
        def logged(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

        stepped = ended = logged

    stream = io.StringIO()
    watchers = Watchers([Full(), JsonLines(stream)])
    watchers.logged(ROWS[:1])
    watchers.ended()
    assert json.loads(stream.getvalue()) == ROWS[0]
    assert caplog.messages[0] == "Full: [Errno 28] No space left on device; training goes on"


def test_tensorboard_gets_every_finite_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[tuple] = []
    ended: list[str] = []
    writer = SimpleNamespace(
        add_scalar=lambda *scalar: added.append(scalar), flush=lambda: None, close=lambda: ended.append("closed")
    )
    module = SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    board = TensorBoard(tmp_path)
    board.logged(ROWS)
    board.ended()
    assert added == [("loss", 0.5, 3), ("seconds", 1.0, 3), ("seconds", 2.0, 4)] and ended == ["closed"]


def test_a_curve_is_drawn_of_the_whole_log(tmp_path: Path) -> None:
    log, picture = tmp_path / "log.jsonl", tmp_path / "loss.png"
    LossCurve(log, picture).ended()
    assert not picture.exists(), "nothing was logged"
    log.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    LossCurve(log, picture).ended()
    assert picture.stat().st_size > 1000


def test_what_matplotlib_is_missing_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "sora_fast.training.curve", None)
    (tmp_path / "log.jsonl").write_text(json.dumps(ROWS[0]))
    LossCurve(tmp_path / "log.jsonl", tmp_path / "loss.png").ended()
    assert "loss.png is not drawn: that needs matplotlib" in caplog.text
