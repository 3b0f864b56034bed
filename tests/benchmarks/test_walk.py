from pathlib import Path

import pytest
import torch

from benchmarks import walk
from benchmarks.cases import Setting
from benchmarks.gpu_suite import Scope, _walkers
from benchmarks.grid import OPS, WHOLES, Plan
from benchmarks.rows import OURS
from benchmarks.shapes import Model

CPU = torch.device("cpu")


def test_it_warms_its_share(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plans = [Plan("segment_mean", Model(width, 2), "tiny") for width in (32, 16)]
    monkeypatch.setattr(Setting, "on_gpu", staticmethod(lambda: Setting.small(CPU)))
    monkeypatch.setattr("benchmarks.grid.headline", lambda: iter([*plans, Plan("adaln", Model(16, 2), "tiny")]))
    monkeypatch.setattr("benchmarks.peers.everyone", lambda op: OURS)
    warmed = []
    for place in range(2):
        walk.warm(CPU, ["segment_mean"], place, 2)
        warmed.append(set(capsys.readouterr().err.split("timing ")[1:]))
    assert not warmed[0] & warmed[1]
    assert {name.strip() for name in warmed[0] | warmed[1]} == {
        f"segment_mean[{label}]" for label in ("C64", "C32, tiny", "C16, tiny")
    }


def test_the_suite_calls_it_by_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr(walk, "warm", lambda device, *arguments: calls.append(arguments))
    jobs = _walkers(tmp_path, Scope(CPU, OPS, WHOLES, 540.0))
    for job in jobs:
        assert job.command[1:3] == ["-m", "benchmarks.walk"]
        walk.main(job.command[3:])
    assert calls == [([*OPS, *WHOLES], place, len(jobs)) for place in range(len(jobs))]
