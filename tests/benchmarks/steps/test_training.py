"""A whole training step, small on a CPU; what is CUDA's alone has a stand-in."""

from itertools import chain
from typing import Any

import pytest
import torch

from benchmarks.rows import Row
from benchmarks.shapes import PACKS
from benchmarks.steps import training
from benchmarks.steps.wholes import OURS
from sora_fast import use_backend
from tests.recording import FakeRecorder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting() -> Any:
    return training._setting(training.SMALL, "tiny", CPU)


@pytest.mark.slow
def test_a_step_is_judged_and_timed() -> None:
    (content,) = training.step(CPU, seconds=0.01, dry=True)("small, tiny")
    row = Row(**content)
    assert (row.op, row.direction, row.tokens) == ("training_step", "step", 47) and row.flops > 1e7
    assert row.rounds.keys() == {OURS, training.PEER}
    assert row.absent == dict.fromkeys((f"{OURS}, compiled", f"{OURS}, compiled, graph"), "it needs a GPU")
    assert 0 < max(row.errors[OURS]) < 1e-5


def test_all_ways_take_the_same_step(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same weights and videos; those for a GPU with stand-ins for the compiler and the capture."""
    monkeypatch.setattr(training, "need_gpu", lambda device: None)
    monkeypatch.setattr(training, "compile_loss", lambda *_, **__: "nothing is compiled")
    monkeypatch.setattr(training, "CudaRecorder", lambda device: FakeRecorder())
    row = Row(training.OP, "small, tiny", "step")
    with use_backend("torch"):
        ways = {title: training._tried(make, setting) for title, make in training._WAYS.items()}
        training._judge(ways, setting, row)
    assert len(ways) == 4 and not row.absent
    assert max(map(max, row.errors.values())) < 1e-6
    with torch.no_grad():
        spoiled = training._twin(setting)
        spoiled.model.blocks[1].attn.q_norm = torch.nn.Parameter(torch.zeros(64))
    loss_of = training.PackLoss(spoiled, "float32")
    with use_backend("torch"):
        training._judge({**ways, OURS: training._packed(setting, loss_of)}, setting, row)
    assert not row.agrees(OURS), "it would be seen"


def test_padded_batches_hold_all_and_keep_to_the_budget() -> None:
    grids = PACKS["32k ragged"].grids
    lengths = [t * h * w for t, h, w in grids]
    parts = [lengths[some] for some in training._padded(lengths)]
    assert list(chain.from_iterable(parts)) == lengths and len(parts) == 2
    assert all(len(part) * max(part) <= sum(lengths) for part in parts)
    padded = sum(len(part) * max(part) for part in parts)
    assert 1.4 < padded / sum(lengths) < 1.6


def test_on_a_gpu_it_is_dit_xl() -> None:
    assert training.cases(dry=False) == ["DiT-XL, 32k ragged"]
    assert (training.XL.dim, training.XL.depth) == (1152, 28)
