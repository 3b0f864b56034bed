"""Hot loops beside what was measured: bounds, and said to be no more."""

import json
from pathlib import Path
from typing import Any

import pytest

from sora_fast.cli import main
from sora_fast.report.loops import hot_loops
from tests.report.made_up import pytest_benchmark, save

FORWARD = {
    "warps": 8,
    "instructions": 370,
    "flops": 4_000_000,
    "done": 1.5,
    "products": {"HGMMA 64x64x16": 8, "HGMMA 64x128x16": 4},
    "waits": 1,
    "barriers": 2,
    "bound": 0.9,
    "binding": "issue",
    "alone": 0.5,
}
BLIND = {**FORWARD, "flops": 0, "done": None, "products": {"UTCHMMA": 2}, "bound": None, "binding": "", "alone": None}
ROW_KERNEL = {**FORWARD, "products": {}}


def _save(file: Path, *loops: dict[str, Any]) -> Path:
    row = {"kernel": "packed_attention[full,D128]/forward", "target": "sm_90", "loops": loops}
    file.write_text(json.dumps({"triton": "3.7.1", "rows": [row, {"kernel": "old", "target": "sm_90"}]}))
    return file


def test_a_row_a_loop_with_products(tmp_path: Path) -> None:
    table = hot_loops(_save(tmp_path / "aot.json", FORWARD, ROW_KERNEL, BLIND))
    name = ("packed_attention[full,D128]/forward", "sm_90")
    assert table.rows == (
        (*name, 1, "8×HGMMA 64x64x16 4×HGMMA 64x128x16", "issue", 90.0, 50.0, 1.5, 740.0, 1, 2),
        (*name, 3, "2×UTCHMMA", "not modelled", "", "", "", "", 1, 2),
    )
    assert len(table.columns) == len(table.rows[0])
    assert "not measured" in table.note and "Triton 3.7.1" in table.note


def test_they_stand_on_the_page_and_in_the_markdown(tmp_path: Path) -> None:
    results, loops = save(pytest_benchmark(), tmp_path / "bench.json"), _save(tmp_path / "aot.json", FORWARD)
    out = tmp_path / "report.html"
    assert main(["report", str(results), "--out", str(out)]) == 0
    assert "Hot loops" not in out.read_text()
    assert main(["report", str(results), "--out", str(out), "--loops", str(loops)]) == 0
    for text in (out.read_text(), out.with_suffix(".md").read_text()):
        assert text.count("Hot loops") == 1 and "Bounds, not measured" in text
        assert text.index("Everything measured") < text.index("Hot loops")
    assert "| issue | 90 | 50 | 1.5 | 740 | 1 | 2 |" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[]", "is not as benchmarks.aot writes it"),
        ('{"triton": "3.7.1", "rows": [{"kernel": "old", "target": "sm_90"}]}', "holds no hot loops"),
        ('{"triton": "3.7.1", "rows": [{"loops": [{"products": {"a": 1}}]}]}', "is not as benchmarks.aot writes it"),
    ],
)
def test_another_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, complaint: str
) -> None:
    results, loops = save(pytest_benchmark(), tmp_path / "bench.json"), tmp_path / "aot.json"
    loops.write_text(content)
    out = tmp_path / "report.html"
    assert main(["report", str(results), "--out", str(out), "--loops", str(loops)]) == 2
    assert f"aot.json {complaint}" in capsys.readouterr().err
    assert not out.exists()
