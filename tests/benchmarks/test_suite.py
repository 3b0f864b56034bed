from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import suite as suites
from benchmarks.environment import Ceilings
from benchmarks.gpu_tests import Counts
from benchmarks.rows import Row, absent, failed, table
from benchmarks.smoke import CRASH, OPEN, PASS, Smoke
from benchmarks.suite import DRY, Suite
from benchmarks.summary import summary
from benchmarks.timing import Timing
from benchmarks.tune import Trial
from sora_fast.ops._records import Machine, Record, read_list, source_hash, written
from sora_fast.report import read_result

RECORD = {"commit": "c0ffee", "torch": "2.13", "triton": "3.7.1", "date": "2026-01-01", "device": "some GPU"}
MACHINE = Machine("sm_90", "580.1", "2.13", "3.7.1", "0.1.0")
DRY_MACHINE = replace(MACHINE, device_class=DRY)
FAST, SLOW = [0.9, 1.0, 1.1], [1.9, 2.0, 2.1]


def _row(op: str = "adaln", **rounds: list[float]) -> Row:
    row = Row(op, "C64", "forward", bytes_moved=10**9)
    row.rounds = rounds or {"triton": FAST}
    row.errors = {"torch": [1e-3, 1e-3], "triton": [1e-3, 1e-3]}
    return row


def _smoke(op: str) -> Smoke:
    return Smoke(op, "bfloat16", f"{op}[bfloat16,C64]", PASS, "")


def _passed(device_class: str, op: str) -> Record:
    machine = replace(MACHINE, device_class=device_class)
    return Record(op, "triton", "bfloat16", machine, source="0123", passed=True, cases=1)


def _suite(folder: Path, machine: Machine = DRY_MACHINE, **options: object) -> Suite:
    return Suite(folder, machine, RECORD, Ceilings(2000.0, 1.0), **options)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of sora_fast/ops/validated.json."""
    file = tmp_path / "repository.json"
    monkeypatch.setattr(suites, "VALIDATED", file)
    return file


def test_what_is_known_is_replaced_and_what_was_not_looked_at_stays(tmp_path: Path, repository: Path) -> None:
    """Also what was looked at, but not to the end."""
    others = [("sm_80", "adaln"), ("sm_90", "patch_embed"), ("sm_90", "unpatchify")]
    known = [*others, ("sm_90", "adaln"), ("sm_90", "schedule")]
    repository.write_text(written([_passed(*name) for name in known]))
    suite = _suite(tmp_path, MACHINE)
    suite.smoke = {"a": _smoke("adaln"), "b": replace(_smoke("unpatchify"), status=OPEN)}
    suite.smoke |= {"c": replace(_smoke("schedule"), status=CRASH), "d": replace(_smoke("schedule"), status=OPEN)}
    suite.save()
    found = {(r.machine.device_class, r.op): r for r in read_list(repository)}
    assert found.keys() == {*others, ("sm_90", "adaln")}, "what is wrong now is proved no more"
    assert found["sm_90", "adaln"].source == source_hash("adaln")
    assert found["sm_90", "unpatchify"].source == "0123"
    assert repository.read_text() == (tmp_path / "validated.json").read_text()
    suite.sanitizer = {"errors": 1, "note": ""}
    suite.save()
    assert {r.op for r in read_list(repository)} == {"adaln", "patch_embed"}, "memcheck found something"


def test_before_anything_was_looked_at_nothing_is_replaced(tmp_path: Path, repository: Path) -> None:
    repository.write_text(written([_passed("sm_90", "adaln")]))
    _suite(tmp_path, MACHINE).save()
    assert read_list(repository) == [_passed("sm_90", "adaln")]


def test_a_dry_walk_validates_nothing(tmp_path: Path, repository: Path) -> None:
    suite = _suite(tmp_path, smoke={"a": _smoke("adaln")})
    suite.save()
    assert suite.validated() == [] and read_list(tmp_path / "validated.json") == [] and not repository.exists()


def test_records_of_kernels_before_they_were_tuned_stay_beside_those_to_come(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = _suite(tmp_path, MACHINE, smoke={"packed_attention[bfloat16,C64]": _smoke("packed_attention")})
    before, old = suite.validated(), source_hash("packed_attention")
    to_come = replace(_smoke("packed_attention"), status=OPEN)
    suite.changed("packed_attention", before, {"packed_attention[bfloat16,C64]": to_come})
    suite.save()
    assert [record.source for record in read_list(repository)] == [old]
    monkeypatch.setattr("benchmarks.validation.source_hash", lambda op: "tuned")
    suite.smoke["packed_attention[bfloat16,C64]"] = _smoke("packed_attention")
    suite.save()
    assert {record.source for record in read_list(repository)} == {old, "tuned"}


def test_a_changed_kernel_is_hashed_anew(tmp_path: Path) -> None:
    """In this very process, which keeps the hashes that it has made."""
    source_hash("adaln")
    _suite(tmp_path).changed("adaln", [], {})
    assert source_hash.cache_info().currsize == 0


def test_the_summary_says_what_passed_what_won_and_what_was_not_reached(tmp_path: Path) -> None:
    suite = _suite(tmp_path, MACHINE, compared=[_row()], planned=[("adaln", "C128")])
    suite.smoke = {"a": _smoke("adaln"), "b": replace(_smoke("unpatchify"), status=CRASH, reason="crashed: SIGSEGV")}
    fast, slow = (Timing(middle, middle - 0.1, middle + 0.1, 9) for middle in (1.0, 2.0))
    suite.trials = [
        Trial(128, "full", "forward", (128, 64, 8, 3), present=True, time=slow),
        Trial(128, "full", "forward", (128, 128, 8, 2), time=fast),
    ]
    suite.open("tests", ["adaln-0", "others-0"])
    text = summary(suite)
    for line in (
        "smoke: adaln: 1 PASS",
        "smoke: unpatchify: 1 CRASH",
        "  CRASH     unpatchify[bfloat16,C64]: crashed: SIGSEGV",
        "validated: adaln",
        "  by smoke and timed cases alone, without all tests: adaln",
        "  D128, full, forward: 128×128 w8 s2, 2.00× as fast as 128×64 w8 s3",
        "not reached of the timings: adaln[C128]",
        "not reached of the tests: adaln-0, others-0",
    ):
        assert line in text.splitlines()
    assert text.splitlines()[-1].startswith("adaln[C64]") and suite.failed


def test_time_that_ran_out_is_no_failure(tmp_path: Path) -> None:
    suite = _suite(tmp_path, planned=[("adaln", "C128")], smoke={"a": replace(_smoke("adaln"), status=OPEN)})
    suite.tests = {"adaln": Counts(passed=1, complete=False)}
    assert not suite.failed
    for wrong in (failed("adaln", "C64", "hung"), replace(_row(), errors={"torch": [1e-3], "triton": [1.0]})):
        assert replace(suite, compared=[wrong]).failed
    assert replace(suite, tests={"adaln": Counts(failed=1)}).failed


def test_what_is_saved_is_what_the_report_reads(tmp_path: Path) -> None:
    row = _row(torch=SLOW, triton=FAST, SDPA=SLOW)
    row.tokens, row.series, row.absent = 4096, "ragged", {"flash-attn": "not installed"}
    row.errors["SDPA"], row.notes = [1e-3], {"triton": {"joules": 0.5}}
    suite = _suite(tmp_path, planned=[("adaln", "C64"), ("adaln", "C128")], compared=[row], stopped="SIGTERM")
    suite.tests = {"adaln": Counts(passed=1, complete=False)}
    suite.smoke = {"a": _smoke("adaln"), "b": replace(_smoke("adaln"), status=CRASH, reason="crashed: SIGSEGV")}
    suite.open("tuning", ["D72, full, forward"])
    suite.save()
    result = read_result(tmp_path / "suite.json")
    ours = result.by_key["adaln", "C64", "forward", "triton"]
    assert (ours.time.median, ours.tokens, ours.series, ours.notes["joules"]) == (1.0, 4096, "ragged", 0.5)
    assert set(result.missing) == {
        "adaln[C128], both: not run: out of time",
        "flash-attn: not installed",
        "adaln: not all of its tests were run",
        "adaln[bfloat16,C64]: CRASH: crashed: SIGSEGV",
        "not reached of the tuning: D72, full, forward",
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


def test_table_has_the_host_and_the_copy_in_columns_of_their_own() -> None:
    row = _row(triton=FAST, copy=[0.5, 0.5, 0.5], compiled=SLOW)
    row.notes = {"triton": {"host_us": 61.4}}
    head, line = table([row], Ceilings(2000.0, 1.0)).splitlines()
    assert line[head.index("host µs") :].split()[0] == "61"
    assert line[: head.index("copy ms") + 7].endswith("0.500")
    assert line.endswith("compiled: 2.000 ms, ours 2.00× as fast"), "a copy is no entrant"


def test_what_moves_nothing_has_no_rate() -> None:
    row = replace(_row(triton=FAST), bytes_moved=0)
    assert "GB/s" not in table([row], Ceilings(2000.0, 1.0))
