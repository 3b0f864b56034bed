"""A sampler's step, small on a CPU; what is CUDA's alone has a stand-in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.rows import Row
from benchmarks.steps import sampling
from benchmarks.steps.wholes import OURS
from sora_fast import use_backend
from sora_fast.generation import engine
from tests.recording import FakeRecorder

CPU = torch.device("cpu")
GRAPH = f"{OURS}, graph"


@pytest.mark.slow
def test_a_step_is_judged_and_timed() -> None:
    (content,) = sampling.step(CPU, seconds=0.01, dry=True)("small, one clip")
    row = Row(**content)
    assert (row.op, row.tokens) == ("sampler_step", 64)
    assert row.rounds.keys() == {OURS} and len(row.rounds[OURS]) % 6 == 0 and row.agrees(OURS)
    assert row.absent == {GRAPH: "it needs a GPU"}


def _videos(monkeypatch: pytest.MonkeyPatch, recorder: Callable[[Any], Any]) -> tuple[dict[str, Any], Row]:
    monkeypatch.setattr(sampling, "need_gpu", lambda device: None)
    monkeypatch.setattr(engine, "CudaRecorder", recorder)
    networks, row = sampling._networks(dry=True), Row(sampling.OP, "small, one clip", "forward")
    with use_backend("torch"):
        makers = {
            name: lambda graph=graph: sampling._video(networks, sampling._TINY, graph=graph)
            for name, graph in sampling._VARIANTS.items()
        }
        videos = sampling.made(makers, row)
        sampling._judge(videos, networks, sampling._TINY, row)
        row.rounds = sampling._rounds(videos, 0.01)
    return videos, row


def test_with_and_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    videos, row = _videos(monkeypatch, lambda device: FakeRecorder())
    assert row.rounds.keys() == {OURS, GRAPH} and not row.absent
    assert videos[GRAPH]._engine.latency.replayed == 10 and row.agrees(GRAPH)


def test_a_graph_that_was_not_captured_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(FakeRecorder):
        def capture(self, call: Callable[[], Any]) -> Any:
            raise RuntimeError("no")

    _, row = _videos(monkeypatch, lambda device: Fails())
    assert row.rounds.keys() == {OURS} and "could not be captured" in row.absent[GRAPH]


def test_on_a_gpu_it_is_dit_xl_at_three_lengths() -> None:
    assert sampling.cases(dry=False) == [f"DiT-XL, {n}k tokens guided" for n in (1, 8, 32)]
    assert [2 * t * h * w for t, h, w in sampling._GRIDS.values()] == [1024, 8192, 32768]
