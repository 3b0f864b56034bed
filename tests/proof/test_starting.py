"""What a trainer and an engine prove when they start on a GPU, here on one that is not there."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sora_fast import use_backend
from sora_fast.ops import _records
from sora_fast.ops._records import Machine, Record
from sora_fast.proof import Found, Report, prove_at_start, starting
from sora_fast.proof.cases import OPS
from sora_fast.proof.children import Verdict

CUDA = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float32)
MACHINE = Machine("sm_90", "580.65", "2.13.0", "3.7.1", "0.1.0")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU on which nothing is proved. calls: of what proves; found: what that finds; proved: (op, dtype name)."""
    fake = SimpleNamespace(calls=[], found=(), proved=set(), capturing=False, waited=0)

    def find(op: str, backend: str, dtype: torch.dtype | None, device: torch.device) -> Record | None:
        known = (op, _records.dtype_name(dtype)) in fake.proved
        return Record(op, backend, str(dtype), MACHINE, "", passed=True, cases=1) if known else None

    find.cache_clear = lambda: None

    def run(ops: list[str], **options: Any) -> Report:
        fake.calls.append((ops, options))
        return Report(MACHINE, "some GPU", fake.found)

    monkeypatch.setattr(_records, "find", find)
    monkeypatch.setattr(starting, "run", run)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    for variable in ("SORA_FAST_PROVE", "SORA_FAST_BACKEND"):
        monkeypatch.delenv(variable, raising=False)
    return fake


def start(gpu: SimpleNamespace, **options: Any) -> list[str]:
    """The ops that are proved."""

    def wait() -> None:
        gpu.waited += 1

    prove_at_start(CUDA, DTYPES, wait=wait, **options)
    return gpu.calls[-1][0] if gpu.calls else []


def test_what_is_needed_is_proved_within_a_minute(gpu: SimpleNamespace) -> None:
    assert start(gpu) == list(OPS) and gpu.waited == 1
    options = gpu.calls[0][1]
    assert options["dtypes"] == DTYPES and options["seconds"] <= 60 and options["device"] == torch.device("cuda", 0)


def test_once_a_machine(gpu: SimpleNamespace) -> None:
    gpu.proved = {(op, dtype) for op in OPS for dtype in ("any", "bfloat16", "float32")}
    assert start(gpu) == [] and gpu.waited == 1
    gpu.proved -= {("adaln", "float32"), ("schedule", "any")}
    assert start(gpu) == ["adaln", "schedule"]


def test_the_other_workers_wait_for_the_first(gpu: SimpleNamespace) -> None:
    assert start(gpu, leads=False) == [] and gpu.waited == 1


def test_not_where_the_user_does_not_want_it(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with use_backend("torch"):
        assert start(gpu) == []
    monkeypatch.setenv("SORA_FAST_PROVE", "0")
    assert start(gpu) == [] and gpu.waited == 2, "the others wait all the same"


def test_not_in_a_capture_or_a_compiled_region(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.capturing = True
    assert start(gpu) == []
    gpu.capturing = False
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert start(gpu) == []


def test_not_on_a_cpu(gpu: SimpleNamespace) -> None:
    prove_at_start(torch.device("cpu"), DTYPES)
    assert gpu.calls == []


def test_what_fails_is_said_and_what_passes_is_not(gpu: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    gpu.found = (Found("adaln", "bfloat16", "passed", 3),)
    start(gpu)
    assert not caplog.messages
    verdict = Verdict("patch_embed[C72]", "failed", "output 0: error 1, allowed 0.1")
    gpu.found += (Found("patch_embed", "bfloat16", "failed", 3, (verdict,)),)
    start(gpu)
    (message,) = caplog.messages
    assert "patch_embed bfloat16: failed" in message and "error 1, allowed 0.1" in message and "adaln" not in message


def test_a_proof_that_cannot_be_made_costs_nobody_a_run(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(*_: Any, **__: Any) -> Report:
        raise OSError("no process left")

    monkeypatch.setattr(starting, "run", run)
    start(gpu)
    assert gpu.waited == 1 and "no process left" in caplog.messages[0]


def test_ctrl_c_ends_it(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(starting, "run", run)
    with pytest.raises(KeyboardInterrupt):
        start(gpu)


@pytest.mark.parametrize(("precision", "dtypes"), [("bfloat16", DTYPES), ("float32", (torch.float32,))])
def test_trainer_and_engine_ask_for_what_they_compute_in(
    precision: str, dtypes: tuple[torch.dtype, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sora_fast.generation import engine
    from sora_fast.training import trainer
    from sora_fast.training.run import Networks
    from tests.training.test_trainer import Gradients, tiny

    calls: list[tuple[Any, ...]] = []
    for module in (trainer, engine):
        monkeypatch.setattr(module, "prove_at_start", lambda *args, **options: calls.append((args, options["leads"])))
    config = tiny(precision=precision)
    trainer.Trainer(config, Gradients(), tmp_path / "run")
    monkeypatch.setenv("LOCAL_RANK", "1")
    engine.Engine(Networks(config))
    assert calls == [((torch.device("cpu"), dtypes), True), ((torch.device("cpu"), dtypes), False)]
