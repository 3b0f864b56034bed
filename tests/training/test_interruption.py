"""SIGTERM in the two places where a step's end may be minutes away, provoked there."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from sora_fast.training.data.sources import Sample
from sora_fast.training.interruption import Interruption, Stopped
from sora_fast.training.run import CHECKPOINTS
from sora_fast.training.trainer import Trainer
from tests.training.test_trainer import Gradients, tiny

LONG = 60.0


def _seconds(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def test_while_compiling(tmp_path: Path) -> None:
    def endless(graph: Any, inputs: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(LONG)

    torch._dynamo.reset()
    Trainer(tiny(steps=2), Gradients(), tmp_path / "run").fit(progress=False)
    torch._dynamo.register_backend(endless, name="endless")
    trainer = Trainer(tiny(compile="endless"), Gradients(), tmp_path / "run", resume=True)
    before = [p.detach().clone() for p in trainer.parameters.values()]
    assert _seconds(lambda: trainer.fit(progress=False)) < LONG / 2
    assert trainer.step == 2 and [p.name for p in (tmp_path / "run" / CHECKPOINTS).iterdir()] == ["step-00000002"]
    assert all(map(torch.equal, before, trainer.parameters.values()))
    assert all(p.grad is None for p in trainer.parameters.values())


def test_while_data_is_awaited(tmp_path: Path) -> None:
    """Even of a source that never answers."""
    never, main, asked = threading.Event(), threading.main_thread(), []

    class _Stuck(Gradients):
        def __getitem__(self, index: int) -> Sample:
            if index == 45 and not asked:  # once to be measured, and once more
                asked.append(index)
                time.sleep(0.5)  # until the training has caught up
                signal.pthread_kill(main.ident, signal.SIGTERM)
                never.wait(LONG)
            return super().__getitem__(index)

    trainer = Trainer(tiny(), _Stuck(), tmp_path / "run")
    try:
        assert _seconds(lambda: trainer.fit(progress=False)) < LONG / 2
    finally:
        never.set()
    assert 0 < trainer.step < 12
    assert (tmp_path / "run" / CHECKPOINTS / f"step-{trainer.step:08d}").is_dir()
    resumed = Trainer(tiny(), Gradients(), tmp_path / "run", resume=True)
    assert resumed.step == trainer.step


def test_the_second_request_stops_at_once() -> None:
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_may_not_be_left_is_not_left() -> None:
    """In the middle of an update, or beside other workers, a request is only noted."""
    with Interruption() as interruption:
        with interruption.at_once(when=False):
            signal.raise_signal(signal.SIGINT)
        assert interruption.requested
    with Interruption() as interruption, pytest.raises(Stopped), interruption.at_once():
        signal.raise_signal(signal.SIGINT)


def test_an_earlier_request_waits_for_nothing() -> None:
    """One that came while the log was written, say, and then the data are awaited."""
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), interruption.at_once():
            pytest.fail("it waits")
        with interruption.at_once(when=False):
            pass


@pytest.mark.parametrize("error", [BrokenPipeError("nobody reads"), RuntimeError("reentrant call")])
def test_a_request_that_cannot_be_told_is_one(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train | tee log`: Ctrl-C ends tee first."""

    def unheard(text: str) -> None:
        raise error

    monkeypatch.setattr(tqdm, "write", unheard)
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested
    with Interruption() as interruption, pytest.raises(Stopped), interruption.at_once():
        signal.raise_signal(signal.SIGINT)
