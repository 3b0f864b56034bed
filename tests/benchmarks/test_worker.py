"""Workers of the GPU suite that do not do what they should, and the parent that outlives them."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from benchmarks import worker
from benchmarks.tasks import Task
from sora_fast.proof.children import Limits, Verdict, child_environment, judged
from tests.benchmarks.broken_steps import HOW


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Verdict], Path]:
    """What became of all items, and their logs."""
    logs = tmp_path_factory.mktemp("logs")
    task = Task("tests.benchmarks.broken_steps", tuple(HOW), options={"word": "word"})
    limits = Limits(start=400, plan=15, total=800)
    verdicts = judged([task], limits, child_environment(interpreted=True), logs=logs)
    return {verdict.plan: verdict for verdict in verdicts}, logs


@pytest.mark.slow
def test_every_item_has_its_end_whatever_the_others_do(lost: tuple[Mapping[str, Verdict], Path]) -> None:
    verdicts, _ = lost
    assert {name: verdict.verdict for name, verdict in verdicts.items()} == {
        **dict.fromkeys(HOW, "passed"),
        **dict.fromkeys(("raises", "segfault", "hang"), "failed"),
    }
    assert verdicts["good"].found == {"rows": [1.5]}
    assert verdicts["raises"].reason == "ValueError: no such thing\nand more"
    assert verdicts["segfault"].reason.startswith("crashed: SIGSEGV")
    hung = verdicts["hang"].reason
    assert hung.startswith("hung: it was stopped after ") and "at tests.benchmarks.broken_steps:" in hung


@pytest.mark.slow
def test_a_crash_and_a_hang_cost_a_process_and_an_error_does_not(lost: tuple[Mapping[str, Verdict], Path]) -> None:
    verdicts, logs = lost
    processes = [verdicts[name].found for name in HOW if name.startswith(("after", "last"))]
    assert len(set(processes)) == 3
    texts = [file.read_text() for file in sorted(logs.iterdir())]
    assert len(texts) == 3 and all("the log's word on cpu" in text for text in texts)
    assert "--- raises\nTraceback" in texts[0] and "no such thing" in texts[0]


def _said(monkeypatch: pytest.MonkeyPatch, *names: str, answers: bool) -> list[dict]:
    monkeypatch.setattr(worker, "_answers", lambda device: answers)
    said: list[dict] = []
    worker.work(Task("tests.benchmarks.broken_steps", names, "cpu", {"word": "x"}), said.append)
    return said


def test_a_device_that_does_not_answer_any_more_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ready, begins, ends = _said(monkeypatch, "raises", "good", answers=False)
    assert (ready, begins) == ({"ready": 2}, {"begins": "raises"}) and ends["verdict"] == "failed"
    assert len(_said(monkeypatch, "raises", "good", answers=True)) == 5


def test_a_device_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker._answers(torch.device("cpu"))

    def illegal(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", illegal)
    assert not worker._answers(torch.device("cuda"))


def test_a_task_is_what_it_was_on_the_other_side() -> None:
    task = Task("benchmarks.steps.model", ("a", "b"), "cuda:0", {"seconds": 0.5}, 7.0)
    assert Task.read(task.written()) == task and task.title == "model"
