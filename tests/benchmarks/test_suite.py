import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import suite as suites
from benchmarks._checkout import ROOT
from benchmarks.environment import Ceilings
from benchmarks.gpu_suite import Stopped, stopping_after
from benchmarks.gpu_tests import Counts
from benchmarks.rows import Row, absent, failed, table
from benchmarks.suite import DRY, Suite, validate
from sora_fast.ops._records import Machine, Record, read_list, written
from sora_fast.report import read_result

RECORD = {"commit": "c0ffee", "torch": "2.13", "triton": "3.7.1", "date": "2026-01-01", "device": "some GPU"}
MACHINE = Machine("sm_90", "580.1", "2.13", "3.7.1", "0.1.0")
FAST, SLOW = [0.9, 1.0, 1.1], [1.9, 2.0, 2.1]


def _row(op: str = "adaln", *, error: float = 1e-3, failure: str = "", **rounds: list[float]) -> Row:
    row = Row(op, "C64", "forward", bytes_moved=10**9, failure=failure)
    row.rounds = rounds or {"torch": SLOW, "triton": FAST}
    row.errors = {"torch": [1e-3, 1e-3], "triton": [1e-3, error]}
    return row


def _passed(device_class: str, op: str) -> Record:
    machine = replace(MACHINE, device_class=device_class)
    return Record(op, "triton", "bfloat16", machine, source="0123", passed=True, cases=1)


def _suite(folder: Path, **options: object) -> Suite:
    return Suite(folder, replace(MACHINE, device_class=DRY), RECORD, Ceilings(2000.0, 1.0), **options)


def test_a_backend_is_validated_if_tests_passed_and_results_agree() -> None:
    validated = validate({"adaln": Counts(passed=7, skipped=1)}, [_row(), _row()], RECORD, MACHINE)
    assert [record.key for record in validated] == [
        ("adaln", "triton", dtype) for dtype in ("float16", "bfloat16", "float32")
    ]
    assert {(record.machine, record.passed, record.cases) for record in validated} == {(MACHINE, True, 2)}
    assert {(record.device, record.date) for record in validated} == {("some GPU", "2026-01-01")}
    assert "c0ffee, 7 tests passed" in validated[0].note


def test_an_op_of_integers_has_no_dtype() -> None:
    (record,) = validate({"schedule": Counts(passed=7)}, [_row("schedule")], RECORD, MACHINE)
    assert record.dtype == "any"


@pytest.mark.parametrize(
    ("counts", "rows"),
    [
        pytest.param(Counts(passed=7, failed=1), [_row()], id="a test failed"),
        pytest.param(Counts(passed=7, complete=False), [_row()], id="not all tests ran"),
        pytest.param(Counts(skipped=3), [_row()], id="no test ran"),
        pytest.param(Counts(passed=7), [_row(), _row(error=2.1e-3)], id="a case disagrees"),
        pytest.param(Counts(passed=7), [_row(), _row(error=float("nan"))], id="a case gives NaN"),
        pytest.param(Counts(passed=7), [_row(), _row(failure="out of time")], id="a case did not run"),
        pytest.param(Counts(passed=7), [_row(torch=SLOW)], id="no kernel"),
    ],
)
def test_otherwise_it_is_not(counts: Counts, rows: list[Row]) -> None:
    assert validate({"adaln": counts}, rows, RECORD, MACHINE) == []


def test_an_op_without_tests_is_not_validated() -> None:
    assert validate({}, [_row()], RECORD, MACHINE) == []


def test_cut_off_it_validates_what_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And keeps the records of the ops that it did not look at, and of other devices."""
    repository = tmp_path / "repository.json"
    before = [("sm_80", "adaln"), ("sm_90", "patch_embed"), ("sm_90", "adaln"), ("sm_90", "unpatchify")]
    repository.write_text(written([_passed(*name) for name in before]))
    monkeypatch.setattr(suites, "VALIDATED", repository)
    suite = _suite(tmp_path, expected=[("adaln", "C64"), ("unpatchify", "K64"), ("unpatchify", "K32")])
    suite.machine = MACHINE
    suite.tests = {"adaln": Counts(passed=7), "unpatchify": Counts(passed=7)}
    suite.cases = [_row("adaln"), Row(**{**asdict(_row("unpatchify")), "case": "K64"})]
    suite.save_validated()
    found = {(r.machine.device_class, r.op): r for r in read_list(repository)}
    assert found.keys() == set(before[:3]) and "7 tests passed" in found["sm_90", "adaln"].note
    suite.sanitizer = {"errors": 1, "note": ""}
    suite.save_validated()
    assert read_list(repository) == [_passed(*name) for name in before[:2]], "memcheck found something"


def test_what_is_saved_is_what_the_report_reads(tmp_path: Path) -> None:
    row = _row(torch=SLOW, triton=FAST, SDPA=SLOW)
    row.tokens, row.series, row.absent = 4096, "ragged", {"flash-attn": "not installed"}
    row.errors["SDPA"], row.notes = [1e-3], {"triton": {"joules": 0.5}}
    suite = _suite(tmp_path, planned=[("adaln", "C64"), ("adaln", "C128")], compared=[row], stopped="SIGTERM")
    suite.tests = {"adaln": Counts(passed=1, complete=False)}
    suite.save()
    result = read_result(tmp_path / "suite.json")
    ours = result.by_key["adaln", "C64", "forward", "triton"]
    assert (ours.time.median, ours.tokens, ours.series, ours.notes["joules"]) == (1.0, 4096, "ragged", 0.5)
    assert set(result.missing) == {
        "adaln[C128], both: not run: out of time",
        "flash-attn: not installed",
        "adaln: not all of its tests were run",
        "what comes after the suite was stopped: SIGTERM",
    }


def test_absence_is_told_once_or_with_its_place() -> None:
    rows = [_row(), _row()]
    rows[0].absent = {"xformers": "not installed", "varlen": "no such mask"}
    rows[1].absent = {"xformers": "not installed", "varlen": "wrong"}
    assert list(absent(rows)) == [
        ("xformers", "not installed"),
        ("varlen on adaln[C64], forward and 0 others", "no such mask"),
        ("varlen on adaln[C64], forward and 0 others", "wrong"),
    ]


def test_table_shows_speed_up_and_share_of_the_ceiling() -> None:
    rows = [_row(torch=SLOW, triton=FAST, SDPA=SLOW), failed("adaln", "C64", "RuntimeError: broken\nmore")]
    text = table(rows, Ceilings(2000.0, 1.0))
    assert "SDPA: 2.000 ms, ours 2.00× as fast" in text and "1000.0 GB/s" in text and "50%" in text
    assert "RuntimeError: broken" in text and "more" not in text


def test_the_clock_stops_it_and_is_no_error() -> None:
    with pytest.raises(Stopped, match="out of time"), stopping_after(0.05):
        try:
            time.sleep(10)
        except Exception:
            pytest.fail("swallowed")
    time.sleep(0.06)  # and rings once


def test_sigterm_stops_it() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), stopping_after(60):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)


def _call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *map(str, arguments)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = _call("--out", tmp_path)
    assert result.returncode == 2 and "no CUDA device" in result.stderr


@pytest.mark.parametrize(
    ("out", "complaint"), [("", "'' is no file or folder"), ("/proc/new", "can be written to /proc")]
)
def test_where_it_cannot_write_it_does_not_begin(out: str, complaint: str) -> None:
    result = _call("--dry", "--out", out)
    assert result.returncode == 2 and complaint in result.stderr


@pytest.mark.slow
def test_dry_walk_measures_every_op(tmp_path: Path) -> None:
    proved = ROOT / "sora_fast" / "ops" / "validated.json"
    before = proved.read_bytes() if proved.exists() else None
    result = _call("--dry", "--minutes", "30", "--out", tmp_path)  # a busy machine is no failure
    assert result.returncode == 0, result.stdout + result.stderr
    suite = json.loads((tmp_path / "suite.json").read_text())
    assert suite["environment"]["torch"] and suite["ceilings"]["gigabytes_per_second"] > 0 and not suite["stopped"]
    assert not [row for row in suite["rows"] if row["failure"]]
    kernels = {row["op"] for row in suite["rows"] if "triton" in row["times"]}
    assert kernels == {
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
    errors = [error for row in suite["rows"] if row["op"] in kernels for error in row["errors"]["triton"]]
    assert 0 <= max(errors) < 1e-5, "fp32 against fp64"
    peers = next(row for row in suite["rows"] if row["tokens"])
    assert peers["times"].keys() == {"triton", "torch", "SDPA"} and "flash-attn" in peers["absent"]
    assert DRY not in {r.machine.device_class for r in read_list(tmp_path / "validated.json")}, "nothing ran on a GPU"
    assert result.stdout.rstrip().splitlines()[-1].startswith("packed_attention"), "the table comes last"
    assert (proved.read_bytes() if proved.exists() else None) == before
