"""The rehearsal of the GPU suite: that it leaves nothing out, and that it tells a launch that fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import grid, rehearsal, smoke, stub_driver, tune
from benchmarks._checkout import ROOT
from benchmarks.steps import model
from benchmarks.tasks import Task
from sora_fast.proof.cases import OPS


def test_it_is_all_that_the_suite_launches() -> None:
    found = list(rehearsal.tasks(rehearsal.PHASES, [""]))
    names = {
        phase: [n for task in found if task.options["phase"] == phase for n in task.names] for phase in rehearsal.PHASES
    }
    assert sorted(names["smoke"]) == sorted(plan.name for plan in smoke.plans(OPS, "cuda:0"))
    assert names["headline"] == [plan.name for plan in sorted(grid.headline(), key=_place_of_op)]
    assert names["model"] == model.cases(dry=False)
    assert names["tuning"] == [item.name for item in tune.items()]
    everything = [name for some in names.values() for name in some]
    assert len(everything) == len(set(everything)), "a line would not tell which"


def _place_of_op(plan: grid.Plan) -> int:
    return [other.op for other in grid.headline()].index(plan.op)


def test_a_launch_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("good", "raises", "segfault", "after it, in another process")
    task = Task("tests.benchmarks.broken_rehearsal", names, "cpu", {"phase": "smoke"})
    assert rehearsal.rehearse([task], tmp_path) == 1
    printed = capsys.readouterr().out
    assert "FAILED           smoke: raises: ValueError: no such thing\nand more\n" in printed
    *lines, last = printed.replace("\nand more", "").splitlines()
    assert [line.split()[0] for line in lines] == ["launched", "does", "FAILED", "FAILED", "launched"]
    assert "crashed: SIGSEGV" in lines[3]
    assert last.startswith("4 launches") and "2 items failed" in last and "nothing about values or times" in last


@pytest.mark.skipif(bool(stub_driver.why_not()), reason=str(stub_driver.why_not()))
def test_the_cheapest_part_of_it() -> None:
    """In a process that compiles kernels, as it is called by a user."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.rehearsal", "--phases", "smoke", "--only", "gelu,H1536"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    line, last = done.stdout.splitlines()
    assert line.startswith("launched") and line.endswith("smoke: mlp_activation[bfloat16,gelu,H1536]")
    assert not last.startswith("0 launches") and "0 items failed" in last
