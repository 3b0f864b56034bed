from dataclasses import replace

import pytest

from benchmarks.gpu_tests import Counts
from benchmarks.rows import Row
from benchmarks.smoke import CRASH, FAIL, OPEN, PASS, Smoke
from benchmarks.validation import Evidence
from sora_fast.ops._records import BY_CASES, BY_TESTS, Machine, Record, source_hash

RECORD = {"commit": "c0ffee", "date": "2026-01-01", "device": "some GPU"}
MACHINE = Machine("sm_90", "580.1", "2.13", "3.7.1", "0.1.0")
SMOKE = [Smoke("adaln", "bfloat16", f"adaln[bfloat16,C{width}]", PASS, "") for width in (384, 1152)]
ALL_DTYPES = ["float16", "bfloat16", "float32"]


def _row(error: float = 1e-3, failure: str = "") -> Row:
    row = Row("adaln", "C64", "forward", failure=failure)
    row.rounds = {"triton": [1.0]}
    row.errors = {"torch": [1e-3, 1e-3], "triton": [1e-3, error]}
    return row


def _evidence(smoke: list[Smoke] = SMOKE, rows: tuple[Row, ...] = (), **tests: Counts) -> Evidence:
    return Evidence(smoke, rows, tests, RECORD, MACHINE)


def test_smoke_alone_is_a_pass_of_its_dtype_and_says_so() -> None:
    (record,) = _evidence(rows=(_row(),)).records()
    assert record == Record(
        op="adaln",
        backend="triton",
        dtype="bfloat16",
        machine=MACHINE,
        source=source_hash("adaln"),
        passed=True,
        cases=3,
        device="some GPU",
        date="2026-01-01",
        note="benchmarks.gpu_suite at c0ffee, not all of its tests were run",
        checked=BY_CASES,
    )


def test_with_all_tests_it_is_a_pass_of_all_dtypes() -> None:
    records = _evidence(adaln=Counts(passed=7, skipped=1)).records()
    assert sorted(record.dtype for record in records) == sorted(ALL_DTYPES)
    assert {(record.checked, record.note) for record in records} == {
        (BY_TESTS, "benchmarks.gpu_suite at c0ffee, 7 tests passed")
    }


@pytest.mark.parametrize("counts", [Counts(passed=7, complete=False), Counts(skipped=3)], ids=["not all", "skipped"])
def test_with_some_tests_it_rests_on_the_cases(counts: Counts) -> None:
    assert [(record.dtype, record.checked) for record in _evidence(adaln=counts).records()] == [("bfloat16", BY_CASES)]


def test_an_op_of_integers_has_no_dtype() -> None:
    smoke = [Smoke("schedule", "any", "schedule[full]", PASS, "")]
    for tests in ({}, {"schedule": Counts(passed=7)}):
        assert [record.dtype for record in _evidence(smoke, **tests).records()] == ["any"]


@pytest.mark.parametrize("status", [FAIL, CRASH, OPEN])
def test_one_plan_that_did_not_pass_is_enough(status: str) -> None:
    smoke = [SMOKE[0], replace(SMOKE[1], status=status)]
    assert _evidence(smoke, adaln=Counts(passed=7)).records() == []


@pytest.mark.parametrize(
    ("counts", "row"),
    [
        pytest.param(Counts(passed=7, failed=1), _row(), id="a test failed"),
        pytest.param(Counts(passed=7), _row(error=2.1e-3), id="a large case disagrees"),
        pytest.param(Counts(passed=7), _row(error=float("nan")), id="a large case gives NaN"),
        pytest.param(Counts(passed=7), _row(failure="hung: it was stopped after 45 s"), id="a large case hung"),
    ],
)
def test_whatever_is_wrong_counts_wherever_it_was_seen(counts: Counts, row: Row) -> None:
    assert _evidence(rows=(_row(), row), adaln=counts).records() == []
    assert len(_evidence(rows=(_row(), replace(row, op="unpatchify")), unpatchify=counts).records()) == 1
