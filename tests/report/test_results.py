"""Results are read as the benchmarks write them, and anything else is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from sora_fast.report import read_result
from sora_fast.report.results import Ceilings
from tests.report.made_up import pytest_benchmark, save, suite


def test_suite(tmp_path: Path) -> None:
    result = read_result(save(suite(), tmp_path / "suite.json"))
    assert (result.device, result.commit, result.ceilings) == ("Some GPU", "a" * 40, Ceilings(4000.0, 800.0))
    m = result.by_key["adaln", "C1152", "forward", "triton"]
    moved = 4 * 1152 * 32768
    assert (m.bytes_moved, m.time.samples, m.notes["error"]) == (moved, 50, 1e-3)
    assert m.least(result.ceilings) == pytest.approx(moved / 4e9), "milliseconds at 4000 GB/s"
    assert m.rate == f"{4000 / 1.1:.4g} GB/s"
    attention = result.by_key["packed_attention", "full,D128,8192", "backward", "torch"]
    assert (attention.tokens, attention.series) == (8192, "full,D128")
    assert result.missing == ("segment_mean[C1152], both: not run: out of time",)


def test_pytest_benchmark(tmp_path: Path) -> None:
    result = read_result(save(pytest_benchmark(waste=0.25), tmp_path / "bench.json"))
    assert (result.device, result.commit) == ("Some CPU", "b" * 40 + "+changes")
    (m,) = result.measurements
    assert m.key == ("adaln", "", "", "adaln-eager")
    assert (m.time.low, m.time.median, m.time.high) == pytest.approx((1.01, 1.05, 1.09)), "seconds become milliseconds"
    assert m.notes == {"waste": 0.25} and m.rate == "" and m.least(Ceilings(1, 1)) == 0


def test_extra_info_says_what_was_measured(tmp_path: Path) -> None:
    extra = {
        "op": "attention",
        "case": "full",
        "direction": "forward",
        "backend": "flash_attn",
        "flops": 10**9,
        "tokens": 1024,
        "ceilings": {"gigabytes_per_second": 10.0, "teraflops": 2.0},
        "absent": {"xformers": "not installed"},
    }
    result = read_result(save(pytest_benchmark(**extra), tmp_path / "bench.json"))
    (m,) = result.measurements
    assert m.key == ("attention", "full", "forward", "flash_attn") and m.tokens == 1024 and m.notes == {}
    assert m.least(result.ceilings) == pytest.approx(0.5)
    assert result.missing == ("xformers: not installed",)


def test_without_single_rounds_quartiles_stand_in(tmp_path: Path) -> None:
    content = pytest_benchmark()
    del content["benchmarks"][0]["stats"]["data"]
    (m,) = read_result(save(content, tmp_path / "bench.json")).measurements
    assert (m.time.low, m.time.high, m.time.samples) == pytest.approx((1.025, 1.075, 11))


def _nothing_ran() -> dict[str, Any]:
    return {**suite(), "rows": [suite()["rows"][-1]]}


def _zero_time() -> dict[str, Any]:
    content = suite()
    content["rows"][0]["times"]["torch"]["median"] = 0
    return content


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("<html>", "is not JSON", id="not JSON"),
        pytest.param("[1, 2]", "holds no results", id="another list"),
        pytest.param('{"answer": 42}', "holds no results", id="another object"),
        pytest.param('{"rows": [{"op": 1}], "tests": {}}', "not as the benchmarks write it", id="a row without times"),
        pytest.param('{"benchmarks": 3}', "not as the benchmarks write it", id="no list"),
        pytest.param(json.dumps({**pytest_benchmark(), "benchmarks": []}), "holds no measurement", id="empty"),
        pytest.param(json.dumps(_nothing_ran()), "no measurement: segment_mean.*out of time", id="nothing ran"),
        pytest.param(json.dumps(_zero_time()), "0 is not a positive number", id="a time of zero"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.json.*{complaint}"):
        read_result(tmp_path / "bad.json")
