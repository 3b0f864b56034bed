"""The whole model's call, small on a CPU; what is CUDA's alone stands in for itself."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import graphs
from benchmarks.rows import Row
from benchmarks.steps import model
from sora_fast import use_backend

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def row() -> Row:
    (content,) = model.step(CPU, seconds=0.01, dry=True)("small, tiny")
    return Row(**content)


@pytest.mark.slow
def test_a_call_is_judged_and_timed(row: Row) -> None:
    assert (row.op, row.case, row.tokens) == ("sora_dit", "small, tiny", 47)
    assert row.rounds.keys() == {"triton"} and row.agrees("triton") and 0 < row.errors["triton"][0] < 1e-5
    assert row.absent == {"triton, compiled": "it needs a GPU", "triton, graph": "it needs a GPU"}


def _works(monkeypatch: pytest.MonkeyPatch, **makers: Callable[..., Callable[[], Tensor]]) -> tuple[dict, Row]:
    monkeypatch.setattr(model, "_VARIANTS", makers)
    row = Row("sora_dit", "small, tiny", "forward")
    small = model.random_model(model.SMALL, CPU)
    batch = model.inputs(small.config, "tiny", CPU)
    with use_backend("torch"):
        works = model._works(small, batch, row)
        model._judge(works, small, batch, row)
    return works, row


def test_who_is_wrong_or_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> Callable[[], Tensor]:
        return lambda: model.call(*args) * 1.001

    def fails(*args: object) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    works, row = _works(monkeypatch, triton=model._eager, compiled=wrong, graph=fails)
    assert works.keys() == {"triton"}
    assert row.absent["compiled"].startswith("wrong: 1.0e-03 from the truth")
    assert row.absent["graph"] == "RuntimeError: operation not permitted when stream is capturing"
    works, row = _works(monkeypatch, triton=wrong)
    assert works.keys() == {"triton"} and not row.agrees("triton"), "ours is told as wrong"


def test_on_a_gpu_it_is_dit_xl_at_three_lengths() -> None:
    config = model.XL
    assert (config.dim, config.depth, config.heads) == (1152, 28, 16)
    assert model.cases(dry=False) == ["DiT-XL, 2k ragged", "DiT-XL, 8k ragged", "DiT-XL, 32k ragged"]


def test_a_graph_is_captured_after_a_warm_up_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: log.append("wait"))
    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: log.append("capture") or nullcontext())

    def work() -> str:
        log.append("work")
        return "outputs"

    replay = graphs.captured(work, CPU)
    assert log == ["wait", "work", "work", "work", "wait", "capture", "work"]
    assert replay() == "outputs" and log[-1] == "replay"
