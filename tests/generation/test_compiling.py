import pytest
import torch

from sora_fast.generation import compiling
from sora_fast.generation.tasks import Request, image_to_video
from tests.generation.random_engine import random_engine


@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_graph_serves_every_pack() -> None:
    """Of one request or several, guided or not, with given frames or without."""
    torch._dynamo.reset()
    eager, engine = random_engine(), random_engine()
    assert compiling.compile_blocks(engine.networks.model, backend="eager")
    packs = [
        [Request("left", 3, 12, 16, guidance=2.0)],
        [Request("left", 2, 8, 8)],
        [Request("a", 3, 10, 14, guidance=2.0), Request("right", 1, 16, 8), Request("right", 2, 8, 8, guidance=3.0)],
        [image_to_video(torch.zeros(1, 1, 8, 12), "right", 4)],
    ]
    for requests in packs:
        for one, other in zip(*(e.generate(requests, steps=2) for e in (eager, engine)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_it_compiles_when_that_saves_more_than_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr("sora_fast.generation.engine.compile_blocks", lambda model: compiled.append(model) or True)
    engine = random_engine(compile=None)
    engine.generate([Request("", 1, 8, 8)], steps=2)
    assert not compiled and not engine.compiled
    monkeypatch.setattr(compiling, "START_UP", 1e-6)
    engine.generate([Request("", 1, 8, 8)], steps=2)
    engine.generate([Request("", 1, 8, 8)], steps=2)
    assert len(compiled) == 1 and engine.compiled
    never = random_engine(compile=False)
    never.generate([Request("", 1, 8, 8)], steps=2)
    assert len(compiled) == 1 and not never.compiled


def test_without_a_compiler_it_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiling, "cpp_problem", lambda: "there is none")
    engine = random_engine(compile=True)
    assert not engine.compiled and "needs a C++ compiler, but there is none" in caplog.text
    assert engine.generate([Request("", 1, 8, 8)], steps=1)[0].isfinite().all()
