"""Kernels compile for Hopper without a GPU, do not spill, and attention uses Hopper's matrix instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._checkout import ROOT


def _compiling(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python where kernels are compiled: the tests themselves may run in a process that interprets them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_spills_are_seen() -> None:
    result = _compiling("-m", "tests.benchmarks.toy_kernels")
    assert result.returncode == 0, result.stderr
    per_target = dict(zip(("sm_80", "sm_90", "sm_100"), map(json.loads, result.stdout.splitlines()), strict=True))
    for target, (good, starved) in per_target.items():
        assert (good["target"], good["spills"], good["problem"]) == (target, 0, "")
        assert good["shared_bytes"] >= 2 * 128 * 128 * 2, "both matrices pass through shared memory"
        assert good["registers"] > 96 >= starved["registers"]
        assert starved["spills"] > 0 and "spills" in starved["problem"]
    assert per_target["sm_90"][0]["hgmma"] > 0
    assert per_target["sm_80"][0]["hgmma"] == 0


@pytest.mark.slow
def test_shipped_kernels_compile_for_hopper(tmp_path: Path) -> None:
    report = tmp_path / "aot.json"
    # One size of everything: whole tables are for `make aot`.
    sizes = ("[C1152", "[full,D72", "[full,D128", "[window,D64", "[cross,D96", "[K64", "[D72", "[D128")
    result = _compiling("-m", "benchmarks.aot", "--target", "sm_90", "--json", report, "--kernel", *sizes)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(report.read_text())
    assert all(row.keys() == {"kernel", "target", "registers", "spills", "shared_bytes", "hgmma"} for row in rows)
    assert [row for row in rows if row["spills"]] == []
    attention = [row for row in rows if row["kernel"].startswith("packed_attention")]
    assert sum(row["hgmma"] > 0 for row in attention) >= 8, attention
    compiled = {row["kernel"].split("[")[0] for row in rows}
    assert compiled == {
        "adaln",
        "gated_residual",
        "gated_residual_adaln",
        "packed_attention",
        "patch_embed",
        "qk_norm_rope",
        "unpatchify",
    }
