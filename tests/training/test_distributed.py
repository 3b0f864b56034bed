"""Several workers in processes of their own, a few small steps each."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from sora_fast.media import write_media
from sora_fast.training.distributed import World, joined, launch
from sora_fast.training.run import CHECKPOINTS, LOG
from sora_fast.training.runlog import read_log
from sora_fast.training.trainer import Trainer
from tests.training.packs import joined as joined_packs
from tests.training.test_trainer import _assert_same_run
from tests.training.together import Measured, config

SCRIPT = str(Path(__file__).with_name("together.py"))
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ROOT)


def test_a_single_worker_exchanges_nothing() -> None:
    with joined() as world:
        assert world == World(0, 1) == World.current() == world.apart()
        tensor = torch.ones(3)
        world.mean([tensor], torch.tensor(7))
        assert world.total(2, 3) == [2, 3]
        assert world.gather(tensor).tolist() == tensor.tolist() == [1, 1, 1]
        assert world.joint(world.shared_out(range(3))) == [0, 1, 2]


def test_two_workers_exchange(tmp_path: Path) -> None:
    before = dict(os.environ)
    assert launch(2, [SCRIPT, "exchange", str(tmp_path)]) == 0
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert max(results.pop("muon")) < 1e-6
        assert results == {
            "mean": [[[0.75] * 3] * 2, 7.5],
            "nothing": [0, 0],
            "total": [1, 3],
            "gather": [[0], [0], [1], [1]],
            "joint": [0, 1, 4, 9, 16],
            "apart": [3],
            "threads": max(1, torch.get_num_threads() // 2),
        }
    assert World.current() == World()
    assert dict(os.environ) == before


def test_a_failing_worker_takes_the_others_along(tmp_path: Path) -> None:
    began = time.monotonic()
    # Its own code, or that of the other, whose exchange fails.
    assert launch(2, [SCRIPT, "fail", str(tmp_path)]) in (3, 1)
    assert time.monotonic() - began < 600, "they did not wait out the half hour that gloo would"


def test_launching_nobody_is_an_error() -> None:
    with pytest.raises(ValueError, match="size: 0"):
        launch(0, [SCRIPT])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", ROOT)
        assert launch(2, [SCRIPT, "runs", str(folder)]) == 0
    return folder


def test_workers_agree_and_a_run_in_parts_is_the_same(runs: Path) -> None:
    (steps, one), (_, other) = (torch.load(runs / "whole" / f"weights{rank}.pt") for rank in range(2))
    assert steps == 4
    assert torch.equal(one, other)
    _assert_same_run(runs / "whole" / "run", runs / "parts" / "run")


@pytest.fixture
def trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The two workers before their first step, in one process."""
    made = []
    for rank in range(2):
        monkeypatch.setattr(World, "current", staticmethod(lambda rank=rank: World(rank, 2)))
        monkeypatch.setattr(World, "total", lambda self, *numbers: list(numbers))
        made.append(Trainer(config(1), Measured(), tmp_path / str(rank)))
    monkeypatch.undo()
    return made


def test_the_step_is_that_of_one_mean_over_all_pixels(runs: Path, trainers: list[Trainer]) -> None:
    """One process that has both packs in one sequence: its loss and the norm of its gradient are those in the log."""
    packs = [trainer._packs([next(iter(trainer.batches))])[0] for trainer in trainers]
    loss, pixels = trainers[0].loss(joined_packs(*packs))
    loss.backward()
    counts = [trainers[0].loss(pack)[1].item() for pack in packs]
    assert pixels == sum(counts) and counts[0] != counts[1]
    norm = torch.stack([p.grad.norm() for p in trainers[0].parameters.values() if p.grad is not None]).norm()
    row = read_log(runs / "whole" / "run" / LOG)[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_samples_are_measured_by_one_worker_each(runs: Path) -> None:
    made = [Counter(map(int, (runs / "decoded" / f"made{rank}.txt").read_text().split())) for rank in range(2)]
    total = made[0] + made[1]
    measured = range(max(total) + 1)
    assert set(total) == set(measured)
    # Once to be measured; once more by the worker that trains on it.
    assert max(total.values()) == 2 and max(max(counter.values()) for counter in made) <= 2
    trained = sum(total.values()) - len(measured)
    assert 0 < trained < len(measured)
    assert abs(sum(made[0].values()) - sum(made[1].values())) < len(measured) / 2


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    ramp = torch.linspace(-1, 1, 24)
    for index in range(6):
        write_media(tmp_path / "clips" / f"{index}.gif", ramp.roll(index).expand(1, 1 + index % 3, 16, 24))
    return tmp_path / "clips"


CLI = ["-m", "sora_fast.cli", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *CLI]
SMALL = "--dim 32 --depth 1 --heads 2 --capacity 128 --grey --no-compile --device cpu"


def test_torchrun_trains_one_run(clips: Path, tmp_path: Path) -> None:
    """Begun by two workers, interrupted, and gone on with by one."""
    run = tmp_path / "run"
    arguments = ["--data", str(clips), "--out", str(run), "--steps", "100000", *SMALL.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*TORCHRUN, *arguments], **pipes) as process:
        deadline = time.monotonic() + 300
        while len(read_log(run / LOG)) < 20 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        said, complained = process.communicate(timeout=120)
    assert "sora-fast: error" not in complained, complained  # torchrun itself says that it was interrupted
    assert said.count("6 files to train on") == 1
    assert said.count("Saved at step") == 1
    steps = [row["step"] for row in read_log(run / LOG)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 20
    assert max(int(path.name.removeprefix("step-")) for path in (run / CHECKPOINTS).iterdir()) == steps[-1]

    again = [sys.executable, *CLI, "--resume", "--out", str(run), "--steps", str(steps[-1] + 3), "--device", "cpu"]
    result = subprocess.run(again, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert f"Done: {steps[-1] + 3} steps" in result.stdout
