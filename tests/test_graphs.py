"""A graph with a stand-in for CUDA's capture (tests/recording.py)."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sora_fast.graphs import WARM_UP, CudaRecorder, Graph
from sora_fast.packing._bundle import TensorBundle
from tests.recording import FakeRecorder


@dataclass(frozen=True, eq=False)
class _Part(TensorBundle):
    value: Tensor


@dataclass(frozen=True, eq=False)
class _Inputs(TensorBundle):
    x: Tensor
    parts: tuple[_Part, ...]
    fixed: _Part
    scale: float = 1.0


def _sum(given: _Inputs) -> tuple[Tensor, Tensor]:
    total = given.x * given.scale + given.fixed.value
    for part in given.parts:
        total = 10 * total + part.value
    return total, total.sum()


def _inputs(*numbers: float, fixed: _Part | None = None) -> _Inputs:
    x, *parts = (torch.full((2,), number) for number in numbers)
    return _Inputs(x, tuple(map(_Part, parts)), fixed or _Part(torch.zeros(2)))


def test_every_call_is_of_its_own_inputs() -> None:
    graph, seen = Graph(_sum, recorder := FakeRecorder()), []
    for step in range(6):
        given = _inputs(step, step + 1, step + 2)
        outputs = graph(given)
        seen.append((outputs, _sum(given)))
    assert len(recorder.tapes) == 1 and graph.replays == 6 - WARM_UP
    for outputs, expected in seen:  # at the end: no replay has written into what an earlier one gave
        assert all(map(torch.equal, outputs, expected))


def test_what_two_inputs_share_once_they_need_not_share_later() -> None:
    graph, both = Graph(_sum, FakeRecorder()), _Part(torch.ones(2))
    for step in range(5):
        given = _inputs(step, 1, 1) if step else _Inputs(torch.zeros(2), (both, both), both)
        given = given if step < 3 else _inputs(step, 2, 3)
        assert torch.equal(graph(given)[0], _sum(given)[0])


def test_a_bundle_that_stays_is_not_copied_again() -> None:
    graph, fixed = Graph(_sum, FakeRecorder()), _Part(torch.ones(2))
    for step in range(4):
        graph(_inputs(step, 1, fixed=fixed))
    fixed.value.fill_(5)  # which a frozen bundle is not
    assert graph(_inputs(0, 0, fixed=fixed))[0].tolist() == [10, 10]
    assert graph(_inputs(0, 0, fixed=_Part(fixed.value)))[0].tolist() == [50, 50]


def test_errors() -> None:
    graph = Graph(_sum, FakeRecorder())
    graph(_inputs(1, 2))
    with pytest.raises(ValueError, match=r"x: \[3\] on cpu; it must be \[2\] on cpu, as it was before"):
        graph(_Inputs(torch.zeros(3), (_Part(torch.zeros(2)),), _Part(torch.zeros(2))))
    with pytest.raises(ValueError, match="parts"):
        graph(_inputs(1, 2, 3))
    with pytest.raises(ValueError, match=r"scale: 2\.0; it must be 1\.0"):
        graph(_Inputs(torch.zeros(2), (_Part(torch.zeros(2)),), _Part(torch.zeros(2)), scale=2.0))
    with pytest.raises(ValueError, match="a CUDA graph needs a GPU, and the device is cpu"):
        CudaRecorder(torch.device("cpu"))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    device = torch.device("cuda")
    graph = Graph(_sum, CudaRecorder(device))
    for step in range(6):
        given = _inputs(step, step + 1, step + 2).to(device)
        assert all(map(torch.equal, graph(given), _sum(given)))
    assert graph.replays == 6 - WARM_UP
