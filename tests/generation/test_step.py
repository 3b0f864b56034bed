"""A step as a graph, with a stand-in for CUDA's capture: one for all packs of a room, to the bits of the step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_fast.diffusion.paths import DDPM
from sora_fast.generation.engine import SAMPLERS, Engine
from sora_fast.generation.step import StepGraphs
from sora_fast.generation.tasks import Request
from sora_fast.graphs import Graph
from tests.generation.random_engine import random_engine
from tests.recording import FakeRecorder, places

FIRST = [
    Request("left", 3, 10, 14, guidance=2.0, seed=1),
    Request("right", 1, 16, 8, guidance=3.0, seed=2),
    Request("on", 4, 8, 8, head=torch.linspace(-1, 1, 64).view(1, 1, 8, 8), guidance=1.5, seed=3),
]
# Of the same room: other shapes, numbers of videos, prompts, guidance and none, given frames and none.
PACKS = [
    FIRST,
    [Request("a longer prompt", 2, 12, 12, guidance=4.0, seed=4), Request("", 3, 9, 13, seed=5)],
    [Request("right", 5, 10, 14, seed=6)],
    [Request("left", 3, 8, 8, tail=torch.zeros(1, 1, 8, 8), guidance=2.0, seed=i) for i in range(4)],
    [Request("left", 2, 8, 8, guidance=2.0, guidance_interval=(0.5, 1.0), seed=7, steps=6), FIRST[1]],
]


class _Plain:
    """A recorder of which a replay is the call itself."""

    def warm_up(self, call: Callable[[], Any]) -> Any:
        return call()

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        outputs = call()
        return lambda: [mine.copy_(new) for mine, new in zip(outputs, call(), strict=True) if mine is not None], outputs


def with_graphs(recorder: Any, **model: object) -> Engine:
    engine = random_engine(**model)
    engine._graphs = StepGraphs(recorder)
    return engine


def graphs(engine: Engine) -> list[Graph]:
    return [graph for graph in engine._graphs._graphs.values() if isinstance(graph, Graph)]


@pytest.mark.parametrize(
    ("sampler", "forms"), [("euler", 1), ("dpm++", 2), ("heun", 2)]
)  # of DPM++ the first step has no memory, of Heun the last is another
def test_one_graph_serves_every_pack_of_a_room(sampler: str, forms: int) -> None:
    engine, roomy, exact = with_graphs(recorder := FakeRecorder()), with_graphs(_Plain()), random_engine()
    for requests in PACKS:
        made, plain, alone = (e.generate(requests, steps=5, sampler=SAMPLERS[sampler]) for e in (engine, roomy, exact))
        for video, same, near in zip(made, plain, alone, strict=True):
            assert torch.equal(video, same)
            torch.testing.assert_close(video, near, rtol=0, atol=2e-5)
    assert len(graphs(engine)) == forms == len(recorder.tapes)
    assert torch.equal(engine.generate(FIRST, steps=5)[2][:, :1], FIRST[2].head)


def test_a_graph_reads_its_own_inputs_and_the_weights_alone() -> None:
    engine = with_graphs(recorder := FakeRecorder())
    engine.generate(FIRST, steps=4)
    (graph,), (tape,) = graphs(engine), recorder.tapes
    own: list[Tensor] = []
    graph._own._map(lambda tensor: own.append(tensor) or tensor)
    model = engine.networks.model
    assert places(tape.outside) <= places([*own, *model.parameters(), *model.buffers()])


def test_steps_are_told_apart_from_replays() -> None:
    engine = with_graphs(FakeRecorder())
    engine.generate(FIRST, steps=5)
    assert engine.latency.replayed == 3 and "3 of 5 launched as one graph each" in str(engine.latency)
    engine.generate(PACKS[1], steps=5)
    assert engine.latency.replayed == 5 and engine.latency.calls == 5
    engine.generate(FIRST, steps=8, cache=0.1)
    assert engine.latency.replayed == 0, "what a cache decides is the host's"


def test_noise_is_fresh_in_every_replay() -> None:
    ddpm = {"path": DDPM(learned_variance=True), "discrete_time": True, "learned_sigma": True, "std": 0.05}
    engine, exact = with_graphs(recorder := FakeRecorder(), **ddpm), random_engine(**ddpm)
    for requests in PACKS[:3]:
        made, alone = (e.generate(requests, steps=6, sampler=SAMPLERS["ddpm"]) for e in (engine, exact))
        for video, near in zip(made, alone, strict=True):
            torch.testing.assert_close(video, near, rtol=1e-4, atol=1e-4)
    assert recorder.tapes


def test_what_cannot_be_captured_runs_on(caplog: pytest.LogCaptureFixture) -> None:
    class Fails(_Plain):
        def capture(self, call: Callable[[], Any]) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    engine, exact = with_graphs(Fails()), random_engine()
    made, alone = (e.generate(FIRST, steps=6) for e in (engine, exact))
    torch.testing.assert_close(made, alone, rtol=0, atol=2e-5)
    assert engine.latency.replayed == 0 and caplog.text.count("cannot be captured (operation not permitted") == 1


def test_a_graph_that_gives_something_else_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    class Stale(_Plain):
        """Its replays give what was captured."""

        def capture(self, call: Callable[[], Any]) -> Any:
            outputs = call()
            return lambda: None, outputs

    engine, exact = with_graphs(Stale()), random_engine()
    made, alone = (e.generate(FIRST, steps=6) for e in (engine, exact))
    torch.testing.assert_close(made, alone, rtol=0, atol=2e-5)
    assert caplog.text.count("it is not used") == 1


def test_a_graph_needs_a_gpu() -> None:
    networks = random_engine().networks
    with pytest.raises(ValueError, match="graph: True, but a CUDA graph needs a GPU"):
        Engine(networks, graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", ["euler", "dpm++", "heun"])
def test_on_a_gpu(sampler: str) -> None:
    networks = random_engine().networks
    graph, plain = (Engine(networks, device="cuda", graph=graph) for graph in (True, False))
    for requests in PACKS:
        made, expected = (e.generate(requests, steps=5, sampler=SAMPLERS[sampler]) for e in (graph, plain))
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)
    assert graph.latency.replayed
