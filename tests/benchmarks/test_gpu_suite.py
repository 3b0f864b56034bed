"""The GPU suite's parent: against children that are made up, as if on a GPU; and dry, with real ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_suite, phases, session, suite, travelling, tune
from benchmarks._checkout import ROOT
from benchmarks.rows import Row
from benchmarks.suite import DRY
from benchmarks.timing import Timing
from sora_fast.ops._records import BY_CASES, Machine, read_list
from sora_fast.proof.cases import COMPILED_OPS
from sora_fast.proof.children import NO_TIME, Limits, Verdict
from tests.benchmarks.triton_cache import keep

MACHINE = Machine("sm_90", "580.1", "2.11", "3.6.0", "0.1.0")
ENVIRONMENT = {"commit": "c0ffee", "device": "NVIDIA H100", "date": "2026-01-01T00:00:00+00:00"}
KERNELS = {
    "adaln",
    "gated_residual",
    "gated_residual_adaln",
    "linear_unpatchify",
    "mlp_activation",
    "packed_attention",
    "patch_embed",
    "schedule",
    "qk_norm_rope",
    "unpatchify",
}


@pytest.fixture(autouse=True)
def _no_gpu_for_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would wake the driver."""

    def touched(*_: object, **__: object) -> None:
        raise AssertionError("the parent touches CUDA")

    for name in ("is_available", "device_count", "_lazy_init", "get_device_properties", "get_device_name", "init"):
        monkeypatch.setattr(torch.cuda, name, touched)


@dataclass
class Children:
    """Stands for `judged` on a machine with an H100. calls: (step or program, names, limits, environment) of each task,
    a list a call. spoiled: verdicts in place of those that all is well."""

    spoiled: Mapping[str, Verdict] = field(default_factory=dict)
    calls: list[list[tuple[str, tuple[str, ...], Limits, Mapping[str, str]]]] = field(default_factory=list)

    def __call__(
        self, tasks: Sequence[Any], limits: Limits, environment: Mapping[str, str], *, logs: Path
    ) -> Iterator[Verdict]:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "00.log").write_text("said")
        steps = [(getattr(task, "step", task.program).rsplit(".", 1)[-1], task) for task in tasks]
        self.calls.append([(step, task.names, limits, environment) for step, task in steps])
        for step, task in steps:
            found = getattr(self, f"_{step}")
            for name in task.names:
                yield self.spoiled.get(name) or Verdict(name, "passed", found=found(name, task))

    def _versions(self, name: str, task: Any) -> Any:
        ceilings = {"gigabytes_per_second": 4300.0, "teraflops": 790.0}
        return {"device": "cuda:0", "environment": ENVIRONMENT, "machine": asdict(MACHINE), "ceilings": ceilings}

    def _building(self, name: str, task: Any) -> str:
        return f"a compiler of {name}"

    def _prover(self, name: str, task: Any) -> None:
        assert task.device == "cuda:0"

    def _comparing(self, name: str, task: Any) -> Any:
        if not task.options["seconds"]:
            return []
        op, case = name.removesuffix("]").split("[")
        errors = {"torch": [1e-3], "triton": [1e-3]}
        return [asdict(Row(op, case, "forward", 10**9, rounds={"triton": [1.0]}, errors=errors))]

    def _model(self, name: str, task: Any) -> Any:
        return self._whole("sora_dit", name)

    def _sampling(self, name: str, task: Any) -> Any:
        return self._whole("sampler_step", name)

    def _training(self, name: str, task: Any) -> Any:
        return self._whole("training_step", name)

    def _whole(self, op: str, name: str) -> Any:
        return [asdict(Row(op, name, "step", rounds={"triton": [1.0]}, errors={"torch": [1e-3], "triton": [1e-3]}))]

    def _tuning(self, name: str, task: Any) -> Any:
        item = next(item for item in tune.items() if item.name == name)
        slow, fast = (asdict(Timing(middle, middle - 0.1, middle + 0.1, 9)) for middle in (2.0, 1.0))
        present = {**asdict(item), "blocks": [128, 64, 8, 3], "present": True, "time": slow, "absent": ""}
        return [present, {**present, "blocks": [128, 128, 8, 2], "present": False, "time": fast}]


@dataclass
class Call:
    """What came of a call: its exit code, what it printed, and the folders that it wrote to."""

    code: int
    printed: str
    out: Path
    checkout: Path

    @property
    def suite(self) -> dict[str, Any]:
        return json.loads((self.out / "suite.json").read_text())


Caller = Callable[..., Call]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Caller:
    """Call the suite as on a GPU, in a checkout of its own."""
    checkout = tmp_path / "checkout"
    (checkout / "kernels").mkdir(parents=True)
    shutil.copy(ROOT / "kernels" / tune.TABLE, checkout / "kernels")
    monkeypatch.setattr(phases, "ROOT", checkout)
    monkeypatch.setattr(suite, "VALIDATED", checkout / "validated.json")
    table = checkout / "kernels" / tune.TABLE
    monkeypatch.setattr(
        "benchmarks.validation.source_hash",
        lambda op, *_: f"{op} {'one' if '(9,' in table.read_text() else 'no'} winner",
    )
    monkeypatch.setattr(session.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(phases, "run_jobs", lambda jobs, **_: {})
    monkeypatch.setattr("benchmarks.sanitizer.shutil.which", lambda name: None)

    def run(children: Children, *arguments: str) -> Call:
        monkeypatch.setattr(session, "judged", children)
        code = gpu_suite.main(["--out", str(tmp_path / "out"), *arguments])
        return Call(code, capsys.readouterr().out, tmp_path / "out", checkout)

    return run


def test_the_whole_call_as_on_a_gpu(call: Caller) -> None:
    children = Children()
    done = call(children)
    assert done.code == 0, done.printed
    assert sorted(file.name for file in done.out.iterdir()) == [
        tune.TABLE,
        "logs.tar.gz",
        "suite.json",
        "validated.json",
    ]
    assert done.suite["seconds"].keys() == phases.PHASES.keys() and not done.suite["stopped"]
    names = [[step for step, *_ in tasks] for tasks in children.calls]
    steps = [sorted({*of_call}) for of_call in names]
    assert steps == [
        ["versions"],
        ["building"],
        ["comparing", "model", "prover", "sampling"],  # smoke, and the caches filled behind it
        ["comparing"],
        ["tuning"],  # compiling
        ["tuning"],
        ["model", "sampling", "training"],
        ["prover"],  # again
    ]
    assert names[2][0] == "prover", "the kernels are judged first"
    assert all(row["failure"] == "" for row in done.suite["rows"])
    assert {smoke["status"] for smoke in done.suite["smoke"]} == {"PASS"}
    assert {smoke["op"] for smoke in done.suite["smoke"]} == KERNELS
    assert {smoke["op"] for smoke in done.suite["smoke"] if smoke["backend"] == "cuda"} == {*COMPILED_OPS}
    assert done.suite["libraries"] == {"cpu": "a compiler of cpu", "cuda": "a compiler of cuda"}


def test_without_the_compiled_library_the_others_are_judged(call: Caller) -> None:
    done = call(Children({"cuda": Verdict("cuda", "failed", "there is no nvcc")}))
    assert done.code == 0 and done.suite["libraries"]["cuda"] == "not built: there is no nvcc"
    assert {smoke["backend"] for smoke in done.suite["smoke"]} == {"triton"}


def test_one_process_at_a_time_is_timed_and_all_have_a_hard_end(call: Caller) -> None:
    children = Children()
    call(children)
    limits = [tasks[0][2] for tasks in children.calls]
    assert [limit.workers for limit in limits] == [1, 2, 14, 1, 14, 1, 1, 14]
    # Nothing took any time here, so that each had all up to its own end. Versions may take longer than planned.
    assert [round(limit.total, -1) for limit in limits] == [60, 40, 100, 220, 130, 310, 440, 470]
    # What a whole model does compiles first.
    plans = [limit.plan for limit in limits if limit.workers == 1]
    assert max(plans[:-1]) < 60 < plans[-1] < 100
    assert all(limit.plan < limit.total + 5 and limit.silence < 60 for limit in limits)
    assert {task[3]["TRITON_INTERPRET"] for tasks in children.calls for task in tasks} == {"0"}


def test_kernels_compiled_elsewhere_are_found_by_every_process(
    call: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "the user's")
    keep(tmp_path / "compiled" / "KERNEL", 90)
    packed = tmp_path / "packed"
    travelling.pack(tmp_path / "compiled", packed, target="sm_90")

    def folders(done: Call, children: Children) -> list[str]:
        assert done.code == 0, done.printed
        return [task[3]["TRITON_CACHE_DIR"] for tasks in children.calls for task in tasks]

    children = Children()
    done = call(children, "--cache", str(packed))
    assert f"1 compiled kernels of {packed}" in done.printed
    first, *others = folders(done, children)
    assert first == "the user's" and len(set(others)) == 1 and others[0].endswith("/triton"), "unknown before versions"

    travelling.pack(tmp_path / "compiled", packed, target="sm_100")
    children = Children()
    done = call(children, "--cache", str(packed))
    assert "--cache is not used, every kernel is compiled here: " in done.printed
    assert "target sm_100, here sm_90" in done.printed
    assert set(folders(done, children)) == {"the user's"}


def test_winners_are_used_and_proved_before_they_are_validated(call: Caller) -> None:
    done = call(Children())
    table = (done.checkout / "kernels" / tune.TABLE).read_text()
    assert table == (done.out / tune.TABLE).read_text() and '(9, "forward", 72, "boxes")' in table
    records = read_list(done.checkout / "validated.json")
    assert {record.op for record in records} == KERNELS and {record.checked for record in records} == {BY_CASES}
    sources = {record.source for record in records if record.op == "packed_attention"}
    assert sources == {"packed_attention no winner", "packed_attention one winner"}
    assert "128×128 w8 s2, 2.00× as fast as 128×64 w8 s3" in done.printed


def test_without_their_proof_only_those_before_are_validated(call: Caller) -> None:
    class OutOfTime(Children):
        def _prover(self, name: str, task: Any) -> None:
            if len(self.calls) == 8:
                self.spoiled = {name: Verdict(name, "unjudged", NO_TIME) for name in task.names}

    done = call(OutOfTime())
    records = [record for record in read_list(done.checkout / "validated.json") if record.op == "packed_attention"]
    assert [record.source for record in records] == ["packed_attention no winner"]
    assert any("packed_attention" in name for name in done.suite["unreached"]["again"])


def test_what_crashed_hung_or_was_not_reached_is_said(call: Caller) -> None:
    crash, hang = "adaln[bfloat16,C384]", "gated_residual[C3072, 32k ragged]"
    spoiled = {
        crash: Verdict(crash, "failed", "crashed: SIGSEGV"),
        hang: Verdict(hang, "failed", "hung: it was stopped after 45 s, at benchmarks.timing:99 (__call__)"),
        "adaln[C3072, 32k ragged]": Verdict("adaln[C3072, 32k ragged]", "unjudged", NO_TIME),
        "D72, boxes, one_pass": Verdict("D72, boxes, one_pass", "unjudged", NO_TIME),
    }
    done = call(Children(spoiled))
    assert done.code == 1
    lines = done.printed.splitlines()
    assert f"CRASH     {crash}: crashed: SIGSEGV" in lines
    assert any(line.startswith(f"WRONG: {hang}, both: hung: ") for line in lines)
    assert "not reached of the timings: adaln[C3072, 32k ragged]" in lines
    assert f"not reached of the tuning: D72, boxes, one_pass: {NO_TIME}" in lines
    assert any(line.startswith("not reached of the tests: packed_attention-0, ") for line in lines)
    validated = {record.op for record in read_list(done.checkout / "validated.json")}
    assert validated == KERNELS - {"adaln", "gated_residual"}


def test_only_some_ops_and_phases(call: Caller) -> None:
    children = Children()
    done = call(children, "--only", "adaln", "--phases", "smoke", "headline")
    assert list(done.suite["seconds"]) == ["versions", "smoke", "headline"]
    assert {smoke["op"] for smoke in done.suite["smoke"]} == {"adaln", "gated_residual_adaln"}
    assert {row["op"] for row in done.suite["rows"]} == {"adaln", "gated_residual_adaln"}
    assert not (done.out / tune.TABLE).exists()


def test_what_was_not_asked_for_is_not_missed(call: Caller) -> None:
    children = Children()
    done = call(children, "--phases", "smoke")
    assert done.suite["rows"] == [] and done.suite["unreached"] == {} and "not reached" not in done.printed
    assert [{step for step, *_ in tasks} for tasks in children.calls] == [{"versions"}, {"prover"}]


def test_cut_off_everything_so_far_is_there(call: Caller) -> None:
    """By SIGTERM while something is timed."""

    class Terminated(Children):
        def _comparing(self, name: str, task: Any) -> Any:
            if task.options["seconds"] and name.startswith("adaln"):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            return super()._comparing(name, task)

    done = call(Terminated())
    assert done.suite["stopped"] == "SIGTERM" and "stopped: SIGTERM" in done.printed and done.code == 0
    assert done.suite["unreached"]["call"] == ["headline", "tuning", "model", "again", "tests", "sanitizer"]
    timed = {row["op"] for row in done.suite["rows"] if not row["failure"]}
    assert "packed_attention" in timed and "adaln" not in timed
    assert {record.op for record in read_list(done.out / "validated.json")} == KERNELS
    assert (done.out / "logs.tar.gz").exists() and not list(done.out.glob(".partial*"))


def test_without_a_device_nothing_begins(call: Caller, capsys: pytest.CaptureFixture[str]) -> None:
    hung = Verdict("this machine", "failed", "hung: it was stopped after 45 s")
    done = call(Children({"this machine": hung}))
    assert done.code == 2 and list(done.out.iterdir()) == []


def test_not_even_an_import_of_the_parent_touches_cuda() -> None:
    code = """
import torch
def touched(*_, **__):
    raise AssertionError("touched")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = touched
from benchmarks import _checkout
_checkout.make_importable()
import benchmarks.gpu_suite, benchmarks.phases, benchmarks.summary
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = _start("--out", tmp_path).communicate()
    assert "there is no CUDA device here; --dry walks through the suite on a CPU" in result[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--out", ""], "'' is no file or folder"),
        (["--out", "/proc/new"], "can be written to /proc"),
        (["--out", ".", "--only", "flash"], "nothing is called so; there are packed_attention, "),
        (["--out", ".", "--phases", "lunch"], "invalid choice: 'lunch'"),
    ],
)
def test_where_it_cannot_work_it_does_not_begin(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(arguments)
    assert complaint in capsys.readouterr().err


def _start(*arguments: str | Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *map(str, arguments)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=hidden, **pipes)


@pytest.mark.slow
def test_terminated_in_earnest_it_leaves_results_and_no_process(tmp_path: Path) -> None:
    process = _start("--dry", "--minutes", "30", "--phases", "smoke", "--only", "attention", "--out", tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not ((tmp_path / "suite.json").exists() and children.read_text()) and process.poll() is None:
        time.sleep(0.1)
    running = children.read_text().split()
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped: SIGTERM" in printed, errors
    assert running and not any(Path(f"/proc/{child}").exists() for child in running)
    assert json.loads((tmp_path / "suite.json").read_text())["environment"]["torch"] == torch.__version__


@pytest.mark.slow
def test_dry_it_walks_through_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = [ROOT / "sora_fast" / "ops" / "validated.json", ROOT / "kernels" / tune.TABLE]
    before = [table.read_bytes() if table.exists() else None for table in tables]
    # A busy machine is no failure. Of the ops those with rows, and the whole model: each has a process for its smoke.
    ops, wholes = ["packed_attention", "gated_residual_adaln"], ["sora_dit", "sampler_step", "training_step"]
    code = gpu_suite.main(["--dry", "--minutes", "60", "--only", *ops, *wholes, "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    assert len(list(tmp_path.iterdir())) <= 8
    found = json.loads((tmp_path / "suite.json").read_text())
    assert found["environment"]["torch"] and found["ceilings"]["gigabytes_per_second"] > 0 and not found["stopped"]
    assert found["unreached"] == {} and found["seconds"].keys() == phases.PHASES.keys()
    assert {(smoke["op"], smoke["status"]) for smoke in found["smoke"]} == {(op, "PASS") for op in ops}
    assert not [row for row in found["rows"] if row["failure"]]
    assert {row["op"] for row in found["rows"]} == {*ops, *wholes}
    errors = [error for row in found["rows"] for error in row["errors"]["triton"]]
    assert 0 <= max(errors) < 1e-5, "fp32 against fp64"
    assert found["rows"][0]["times"].keys() == {"triton", "SDPA"}, "our torch backend is no entrant"
    assert len(found["trials"]) == 2 and not any(trial["absent"] for trial in found["trials"])
    assert found["tests"].keys() == {"packed_attention"}
    assert DRY not in {r.machine.device_class for r in read_list(tmp_path / "validated.json")}, "nothing ran on a GPU"
    assert printed.out.rstrip().splitlines()[-1].startswith("training_step"), "the table comes last"
    assert [table.read_bytes() if table.exists() else None for table in tables] == before
