"""What `sora-fast doctor` sees: this machine, and a GPU that is not there."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sora_fast import doctor
from sora_fast.cli import main
from sora_fast.doctor import examine
from sora_fast.ops import _dispatch, _library, _records
from sora_fast.ops._records import Machine, Record, keep, source_hash
from sora_fast.proof import Found, Report
from sora_fast.proof.cases import OPS
from sora_fast.proof.children import Verdict

MACHINE = Machine("sm_90", "580.65", "2.13.0", "3.7.1", "0.1.0")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for variable in ("SORA_FAST_BACKEND", "SORA_FAST_PROVE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_records, "_own", {})
    _records.forget()
    yield tmp_path / "cache"
    _records.forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with an H100."""
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_records, "driver_version", lambda: "580.65")
    monkeypatch.setattr(Machine, "of", staticmethod(lambda device: MACHINE))
    _records.device_class.cache_clear()


def record(op: str, dtype: str = "bfloat16", *, passed: bool = True, **changes: object) -> Record:
    reason = "" if passed else f"{op}[C72]: output 0: error 1.00e+00, allowed 1.00e-02"
    made = Record(op, "triton", dtype, MACHINE, source_hash(op), passed=passed, cases=3, reason=reason, date="today")
    return replace(made, **changes)


def test_on_a_cpu_everything_is_plain_pytorch_or_compiled(caplog: pytest.LogCaptureFixture) -> None:
    found = examine("cpu")
    compiled = (*_library.OPS, "packed_attention") if _library.missing("cpu") is None else ()
    assert {choice.op for choice in found.choices if choice.backend == "cpu"} == {*compiled}
    assert {choice.backend for choice in found.choices if choice.op not in compiled} == {"torch"}
    attention = {choice.dtype: choice.backend for choice in found.choices if choice.op == "packed_attention"}
    assert {dtype for dtype, backend in attention.items() if backend == "cpu"} == ({"float32"} if compiled else set())
    assert {choice.op for choice in found.choices} == {*OPS, "segment_mean"}
    text = str(found)
    assert f"torch        {torch.__version__}" in text and "the interpreter is for tests" in text
    assert "counts for no GPU" in text
    assert max(map(len, text.splitlines())) <= 120
    assert not caplog.messages


def test_every_op_is_told_by_dtype_and_why(gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    keep([record("adaln"), record("adaln", "float32"), record("schedule", "any"), record("patch_embed", passed=False)])
    found = examine()
    chosen = {(choice.op, choice.dtype): choice.backend for choice in found.choices}
    triton = {name for name, backend in chosen.items() if backend == "triton"}
    dtypes = ("bfloat16", "float16", "float32")
    assert triton == {("adaln", "bfloat16"), ("adaln", "float32"), *(("schedule", dtype) for dtype in dtypes)}
    lines = str(found).splitlines()
    assert any(line.split() == ["adaln", "triton", "torch", "triton"] for line in lines)
    assert any(line.split() == ["patch_embed", "torch", "torch", "torch"] for line in lines)
    assert any("not Triton, patch_embed bf16: wrong on this machine" in line for line in lines)
    assert any("no recorded pass of float16 on sm_90" in line for line in lines)
    assert any("NVIDIA H100, 80 GiB, sm_90" in line for line in lines)
    assert "  right: adaln bf16 fp32" in lines and "  right: schedule" in lines
    assert any(line.startswith("  WRONG: patch_embed bfloat16, today: ") and "1.00e+00" in line for line in lines)
    assert lines[-1] == "  To prove the others: sora-fast doctor --prove"
    assert not caplog.messages, "who asks the doctor needs no reminder"


def test_looking_is_no_call(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_calls", {})
    examine()
    assert _dispatch.explain() == "no op has been called"


def test_records_of_others_are_counted_apart(gpu: None) -> None:
    keep([record("adaln"), record("adaln", "float16", source="another")])
    keep([record("gated_residual", machine=replace(MACHINE, driver="1"))])
    lines = str(examine()).splitlines()
    assert "  2 of other devices, versions or sources" in lines
    assert [line for line in lines if "right:" in line] == ["  right: adaln bf16"]


def test_shipped_records_are_counted(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_records, "VALIDATED", tmp_path / "validated.json")
    others = [record("adaln", machine=replace(MACHINE, triton="3.6.0")), record("patch_embed", source="another")]
    _records.VALIDATED.write_text(_records.written([record("adaln"), *others]))
    found = examine()
    assert found.shipped == 1 and "1 shipped records hold here" in str(found)


def test_json_holds_all_of_it(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    keep([record("adaln")])
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__ and found["cache"] == str(cache)
    assert found["proof"] is None and found["machine"]["device_class"] == "interpreter"
    assert [(r["op"], r["holds_here"]) for r in found["records"]] == [("adaln", False)]
    assert {choice["op"] for choice in found["choices"]} == {*OPS, "segment_mean"}


def test_a_user_sees_it(cache: Path) -> None:
    """In a process of its own, where nothing is interpreted."""
    command = [sys.executable, "-m", "sora_fast.cli", "doctor"]
    found = subprocess.run(command, capture_output=True, text=True, env=_environment(cache), timeout=300)
    assert found.returncode == 0 and not found.stderr
    assert found.stdout.startswith("sora_fast 0.1.0\n") and "By default on" in found.stdout


def _environment(cache: Path) -> dict[str, str]:
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | {"SORA_FAST_CACHE": str(cache)}


@pytest.mark.parametrize(("verdict", "code"), [("passed", 0), ("unjudged", 0), ("failed", 1)])
def test_proving_is_reported_first(
    verdict: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def prove(ops: list[str], **options: object) -> Report:
        calls.append((ops, options["minutes"], options["device"]))
        wrong = () if verdict == "passed" else (Verdict("adaln[C72]", verdict, "output 0: error 1, allowed 0.1"),)
        return Report(MACHINE, "some GPU", (Found("adaln", "bfloat16", verdict, 3, wrong),), 12.0)

    monkeypatch.setattr("sora_fast.proof.prove", prove)
    assert main(["doctor", "--prove", "--minutes", "3", "--ops", "adaln", "--device", "cpu"]) == code
    assert calls == [(["adaln"], 3.0, "cpu")]
    text = capsys.readouterr().out
    assert text.startswith("some GPU (sm_90), 12 s\nadaln bfloat16: ") and "By default on cpu" in text
    assert ("error 1, allowed 0.1" in text) == (verdict != "passed")
    assert main(["doctor", "--prove", "--json", "--device", "cpu"]) == code
    assert json.loads(capsys.readouterr().out)["proof"]["found"][0]["verdict"] == verdict


def test_bad_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--prove", "--ops", "adalm", "--device", "cpu"]) == 2
    assert "ops: 'adalm' has no kernel; it must be one of packed_attention" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["doctor", "--prove", "--minutes", "0"])


def test_optional_packages_are_those_that_the_project_names() -> None:
    text = (Path(doctor.__file__).resolve().parents[1] / "pyproject.toml").read_text()
    assert not [name for name in doctor.OPTIONAL if f'"{name}' not in text]
