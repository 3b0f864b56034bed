import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sora_fast.training import checkpoint


def _tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    model = {"a": torch.full((3, 2), value), "b": torch.arange(4)}
    return {"model": model, "optimizer": {"a.step": torch.tensor(value)}}


def test_round_trip(tmp_path: Path) -> None:
    state = {"cursor": 17, "waiting": [[3, 128], [5, 64]], "seconds": 0.1 + 0.2}
    checkpoint.save(tmp_path, 5, _tensors(0.3), state)
    back = checkpoint.latest(tmp_path)
    assert back is not None
    assert back.step == 5
    assert back.state == state
    for group, named in _tensors(0.3).items():
        for name, value in named.items():
            assert torch.equal(back.tensors[group][name], value)
            assert back.tensors[group][name].dtype == value.dtype


def test_transposed_tensors_come_back_equal(tmp_path: Path) -> None:
    value = torch.randn(4, 6).T
    checkpoint.save(tmp_path, 1, {"model": {"w": value}}, {})
    back = checkpoint.latest(tmp_path)
    assert back is not None
    assert torch.equal(back.tensors["model"]["w"], value)


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10):
        checkpoint.save(tmp_path, step, _tensors(step), {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]


def test_damaged_ones_of_later_steps_do_not_push_out_what_is_written(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        damaged = checkpoint.save(tmp_path, step, _tensors(step), {})
        if step > 4:
            (damaged / "state.json").unlink()
    checkpoint.save(tmp_path, 6, _tensors(6.0), {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]
    back = checkpoint.latest(tmp_path)
    assert back is not None
    assert back.step == 6


def test_same_step_is_replaced(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 4, _tensors(1.0), {})
    checkpoint.save(tmp_path, 4, _tensors(2.0), {})
    back = checkpoint.latest(tmp_path)
    assert back is not None
    assert back.tensors["model"]["a"][0, 0] == 2


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        checkpoint.save(tmp_path, 1, {}, {}, keep=0)


@pytest.mark.parametrize("victim", ["state.json", "model.safetensors"])
@pytest.mark.parametrize("size", [0, 40, None])
def test_damaged_one_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, victim: str, size: int | None
) -> None:
    checkpoint.save(tmp_path, 1, _tensors(1.0), {})
    damaged = checkpoint.save(tmp_path, 2, _tensors(2.0), {})
    if size is None:
        (damaged / victim).unlink()
    else:
        os.truncate(damaged / victim, size)
    back = checkpoint.latest(tmp_path)
    assert back is not None
    assert back.step == 1
    assert "step-00000002" in caplog.text


def test_nothing_but_damaged_ones_is_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        os.truncate(checkpoint.save(tmp_path, step, _tensors(step), {}) / "state.json", 0)
    with pytest.raises(ValueError, match=r"no checkpoint that can be read \(step-00000002: .*; step-00000001: "):
        checkpoint.latest(tmp_path)


_SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from sora_fast.training import checkpoint
step = 0
while True:
    step += 1
    named = {str(i): torch.full((64, 1024), float(step)) for i in range(8)}
    checkpoint.save(Path(sys.argv[1]), step, {"model": named, "optimizer": named}, {"step": step}, keep=2)
    print(step, flush=True)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """Killed while a save is under way: every time, what is left is whole and nothing reported is lost."""
    cut_short = 0
    for attempt in range(4):
        root = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVE_FOREVER, str(root)], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 30
        while not any(root.glob(".partial-*/*")) and time.monotonic() < deadline:
            pass
        os.kill(process.pid, signal.SIGKILL)
        reported = [1] + [int(line) for line in process.stdout.read().split()]
        process.wait()
        cut_short += any(root.glob(".partial-*"))
        back = checkpoint.latest(root)
        assert back is not None
        assert back.step >= reported[-1]
        for named in back.tensors.values():
            assert len(named) == 8
            assert all(bool((t == back.step).all()) for t in named.values())
        checkpoint.save(root, back.step + 1, {"model": {}}, {}, keep=1)
        assert [p.name for p in root.iterdir()] == [f"step-{back.step + 1:08d}"]
    assert cut_short, "no kill fell into a save: the test proves nothing"
