import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._checkout import ROOT
from benchmarks.environment import Ceilings
from benchmarks.gpu_suite import validate
from benchmarks.gpu_tests import Counts
from benchmarks.rows import Row, table
from benchmarks.timing import Timing

RECORD = {"commit": "c0ffee", "torch": "2.13", "triton": "3.7.1", "date": "2026-01-01", "device": "some GPU"}
FAST, SLOW = Timing(1.0, 0.9, 1.1, 9), Timing(2.0, 1.9, 2.1, 9)


def _row(op: str = "adaln", *, error: float = 1e-3, failure: str = "", **times: Timing) -> Row:
    row = Row(op, "C64", "forward", bytes_moved=10**9, failure=failure)
    row.times = times or {"torch": SLOW, "triton": FAST}
    row.errors = {"torch": [1e-3, 1e-3], "triton": [1e-3, error]}
    return row


def test_a_backend_is_validated_if_tests_passed_and_results_agree() -> None:
    validated = validate({"adaln": Counts(passed=7, skipped=1)}, [_row(), _row()], RECORD)
    assert validated == {"adaln": {"triton": {**RECORD, "tests_passed": 7}}}


@pytest.mark.parametrize(
    ("counts", "rows"),
    [
        pytest.param(Counts(passed=7, failed=1), [_row()], id="a test failed"),
        pytest.param(Counts(skipped=3), [_row()], id="no test ran"),
        pytest.param(Counts(passed=7), [_row(), _row(error=2.1e-3)], id="a case disagrees"),
        pytest.param(Counts(passed=7), [_row(), _row(error=float("nan"))], id="a case gives NaN"),
        pytest.param(Counts(passed=7), [_row(), _row(failure="out of time")], id="a case did not run"),
        pytest.param(Counts(passed=7), [_row(torch=SLOW)], id="no kernel"),
    ],
)
def test_otherwise_it_is_not(counts: Counts, rows: list[Row]) -> None:
    assert validate({"adaln": counts}, rows, RECORD) == {}


def test_an_op_without_tests_is_not_validated() -> None:
    assert validate({}, [_row()], RECORD) == {}


def test_table_shows_speed_up_and_share_of_the_ceiling() -> None:
    text = table([_row(), _row(failure="RuntimeError: broken\nmore")], Ceilings(2000.0, 1.0))
    assert "2.00×" in text and "1000.0 GB/s" in text and "50%" in text
    assert "RuntimeError: broken" in text and "more" not in text


def _suite(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *map(str, arguments)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = _suite("--out", tmp_path)
    assert result.returncode == 2 and "no CUDA device" in result.stderr


@pytest.mark.slow
def test_dry_walk_measures_every_op(tmp_path: Path) -> None:
    proved = ROOT / "sora_fast" / "ops" / "validated.json"
    before = proved.read_bytes() if proved.exists() else None
    result = _suite("--dry", "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    suite = json.loads((tmp_path / "suite.json").read_text())
    assert suite["environment"]["torch"] and suite["ceilings"]["gigabytes_per_second"] > 0
    kernels = {row["op"] for row in suite["rows"] if row["times"].keys() == {"torch", "triton"}}
    assert kernels == {
        "adaln",
        "gated_residual",
        "dit_block",
        "gated_residual_adaln",
        "linear_unpatchify",
        "mlp_activation",
        "packed_attention",
        "patch_embed",
        "qk_norm_rope",
        "unpatchify",
    }
    errors = [error for row in suite["rows"] if row["op"] in kernels for error in row["errors"]["triton"]]
    assert 0 <= max(errors) < 1e-5, "fp32 against fp64"
    assert json.loads((tmp_path / "validated.json").read_text())["dry"] == {}, "nothing ran on a GPU"
    assert result.stdout.rstrip().splitlines()[-1].startswith("dit_block"), "the table comes last"
    assert (proved.read_bytes() if proved.exists() else None) == before
