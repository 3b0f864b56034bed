"""Kernels judged in processes of their own: interpreted ones, intact and broken."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sora_fast import prove
from sora_fast.ops import _records
from sora_fast.ops._dispatch import choose, explain
from sora_fast.ops._records import Machine, Record
from sora_fast.proof import Report
from sora_fast.proof.children import Limits, Verdict, child_environment, judged
from sora_fast.proof.proving import run
from sora_fast.proof.tasks import Task
from tests.proof.broken import BROKEN, HOW

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MACHINE = Machine("sm_90", "580.65", "2.13.0", "3.7.1", "0.1.0")
BROKEN_CASES = "tests.proof.broken"
HANG = f"{BROKEN}[float16,hang]"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_records, "_own", {})
    yield tmp_path / "cache"
    _records.forget()


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path, list[tuple[int, int]]]:
    """What is found where one op is broken in every way and another is intact, as if on a GPU; the cache; progress."""
    seen: list[tuple[int, int]] = []
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SORA_FAST_CACHE", str(folder))
        monkeypatch.setattr(_records, "_own", {})
        monkeypatch.setattr(Machine, "of", staticmethod(lambda device: MACHINE))
        limits = Limits(start=400, plan=400, total=800, workers=2)
        options = {"device": CPU, "seconds": 800, "dtypes": [torch.float32], "limits": limits, "cases": BROKEN_CASES}
        report = run([BROKEN, "mlp_activation"], **options, progress=lambda *place: seen.append(place))
        return report, folder, seen


EXPECTED = {
    "wrong": ("failed", "output 0: error"),
    "unwritten": ("failed", "output 0: error nan"),
    "segfault": ("failed", "crashed: SIGSEGV"),
    "raises": ("failed", "RuntimeError: device-side assert"),
    "half": ("failed", "ValueError: output 0: torch.float16, but plain PyTorch gives torch.float32"),
    "no memory on the GPU": ("unjudged", "out of memory: CUDA out of memory"),
    "no memory": ("unjudged", "out of memory: "),
    "killed": ("unjudged", "crashed: SIGKILL"),
    "leaves": ("failed", "crashed: exit code 0"),
}


@pytest.mark.parametrize("name", [name for name in HOW if name != "hang"])
def test_whatever_happens_in_a_kernel_is_named(name: str, broken: tuple) -> None:
    (found,) = (found for found in broken[0].found if found.op == BROKEN)
    wrong = {verdict.plan: verdict for verdict in found.wrong}
    plan = f"{BROKEN}[float32,{name}]"
    if name not in EXPECTED:
        assert plan not in wrong
        return
    verdict, reason = EXPECTED[name]
    assert wrong[plan].verdict == verdict and wrong[plan].reason.startswith(reason)


def records_of(broken: tuple, monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """As another process finds them."""
    monkeypatch.setenv("SORA_FAST_CACHE", str(broken[1]))
    return _records.in_cache()


def test_the_other_kernels_are_proved_all_the_same(broken: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _, seen = broken
    records = records_of(broken, monkeypatch)
    assert {(found.op, found.verdict) for found in report.found} == {(BROKEN, "failed"), ("mlp_activation", "passed")}
    assert {(record.op, record.dtype, record.passed) for record in records} == {
        (BROKEN, "float32", False),
        ("mlp_activation", "float32", True),
    }
    assert seen == [(done, len(HOW)) for done in range(1, len(HOW) + 1)]


def test_what_passed_is_chosen_by_the_next_process_and_what_failed_is_not(
    broken: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORA_FAST_CACHE", str(broken[1]))
    monkeypatch.setattr(Machine, "of", staticmethod(lambda device: MACHINE))
    monkeypatch.setattr(_records, "device_class", lambda device: MACHINE.device_class)
    _records.forget()
    assert choose("mlp_activation", None, CUDA, dtype=torch.float32) == "triton"
    assert choose("mlp_activation", None, CUDA, dtype=torch.bfloat16) == "torch"
    assert choose(BROKEN, None, CUDA, dtype=torch.float32) == "torch"
    assert f"{BROKEN}: torch" in explain() and "not triton: wrong on this machine" in explain()


def test_the_report_says_what_is_off_and_what_to_send_where(broken: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    report, records = broken[0], records_of(broken, monkeypatch)
    text = str(report)
    assert "mlp_activation float32: passed, 1 of 1 cases right" in text
    assert f"{BROKEN} float32: failed, 2 of 11 cases right" in text
    assert "output 0: error" in text and "allowed" in text, "with its numbers"
    assert "stays off" in text and "open an issue with these lines and the output of `sora-fast doctor --json`" in text
    (failed,) = (record for record in records if not record.passed)
    assert "output 0: error" in failed.reason and "no memory" not in failed.reason
    assert not report.ok and "mlp_activation" not in report.only_what_matters()


def test_proved_by_the_interpreter_it_is_still_not_chosen() -> None:
    report = prove(["schedule"], minutes=5)
    assert report.ok and report.machine.device_class == "interpreter" and not report.unwritten
    assert "this proves nothing for one" in str(report)
    assert choose("schedule", None, CPU) == "torch"
    (record,) = _records.in_cache()
    assert record.key == ("schedule", "triton", "any") and record.passed and record.cases == 4


def test_a_hang_is_ended_and_the_next_case_is_judged() -> None:
    names = (HANG, f"{BROKEN}[float32,prints]")
    task = Task(BROKEN, "cpu", names, cases=BROKEN_CASES)
    hang, after = judged(
        [task], Limits(start=400, plan=20, total=600), child_environment(interpreted=True), lambda: None
    )
    assert (hang.plan, hang.verdict) == (names[0], "failed") and hang.reason.startswith("hung: it was stopped after ")
    assert (after.plan, after.verdict) == (names[1], "passed")


def test_out_of_time_nothing_is_recorded() -> None:
    began = time.monotonic()
    report = run(["adaln", "schedule"], device=CPU, seconds=0.2)
    assert time.monotonic() - began < 20
    assert {found.verdict for found in report.found} == {"unjudged"} and "no time was left" in str(report)
    assert "`sora-fast doctor --prove --minutes 10`" in str(report)
    assert _records.in_cache() == []


def test_a_process_that_cannot_start_is_no_verdict_on_a_kernel() -> None:
    report = run(["adaln"], device=CPU, seconds=300, limits=Limits(total=300), cases=BROKEN_CASES, dtypes=[])
    assert report.found == () and report.ok
    task = Task("adaln", "no such device", ("adaln[float32,C72]",))
    (verdict,) = judged([task], Limits(total=300), child_environment(interpreted=True), lambda: None)
    assert verdict.verdict == "unjudged" and verdict.reason.startswith(
        "its process did not start: crashed: exit code 1"
    )
    assert "no such device" in verdict.reason


def test_an_interruption_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen] = []
    start = subprocess.Popen

    def popen(*args: object, **options: object) -> subprocess.Popen:
        started.append(start(*args, **options))
        return started[-1]

    monkeypatch.setattr("sora_fast.proof.children.subprocess.Popen", popen)
    names = (f"{BROKEN}[float32,right in between]", HANG)

    def interrupted() -> None:
        raise KeyboardInterrupt

    task = Task(BROKEN, "cpu", names, cases=BROKEN_CASES)
    with pytest.raises(KeyboardInterrupt):
        list(judged([task], Limits(total=300), child_environment(interpreted=True), interrupted))
    assert started and all(process.poll() is not None for process in started)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ops": ["adalm"]}, ValueError, "ops: 'adalm' has no kernel; it must be one of packed_attention, "),
        ({"ops": "adaln"}, TypeError, r"ops: 'adaln'; it must be a list of names, like \['adaln'\]"),
        ({"minutes": 0}, ValueError, "minutes: 0; it must be a positive number"),
        ({"minutes": float("nan")}, ValueError, "minutes: nan; it must be a positive number"),
        ({"device": "meta"}, ValueError, "device: meta; it must be cuda, or cpu"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prove(**options)


def test_a_report_of_many_failures_is_short() -> None:
    from sora_fast.proof import Found

    found = Found("adaln", "bfloat16", "failed", 9, tuple(Verdict(str(i), "failed", "x") for i in range(7)))
    assert str(found).splitlines()[-1] == "    and 3 more"
