"""Kernels compile for Hopper without a GPU, spill nothing in their loops, and attention uses Hopper's instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks._checkout import ROOT
from benchmarks.snapshot import Row


def _compiling(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python where kernels are compiled: the tests themselves may run in a process that interprets them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def toys() -> dict[str, list[dict[str, Any]]]:
    result = _compiling("-m", "tests.benchmarks.toy_kernels")
    assert result.returncode == 0, result.stderr
    return dict(zip(("sm_80", "sm_90", "sm_100"), map(json.loads, result.stdout.splitlines()), strict=True))


def test_spills_are_seen(toys: dict[str, list[dict[str, Any]]]) -> None:
    for target, (good, starved, _) in toys.items():
        assert (good["target"], good["spills"], good["problem"]) == (target, 0, "")
        assert good["shared_bytes"] >= 2 * 128 * 128 * 2, "both matrices pass through shared memory"
        assert good["registers"] > 96 >= starved["registers"]
        assert starved["spills"] > 0 and "spills" in starved["problem"]
    assert toys["sm_90"][0]["hgmma"] > 0
    assert toys["sm_80"][0]["hgmma"] == 0


def test_a_loop_is_read_as_it_was_written(toys: dict[str, list[dict[str, Any]]]) -> None:
    """One product of 128×128×128 a step by 8 warps, reckoned by hand."""
    per_target = {target: rows[2]["loops"] for target, rows in toys.items()}
    for (loop,) in per_target.values():
        assert (loop["flops"], loop["warps"]) == (2 * 128**3, 8)
        assert loop["loaded"] == 2 * 128 * 128 * 2 // 256
    (ampere,), (hopper,), (blackwell,) = per_target.values()
    assert (ampere["products"], ampere["done"]) == ({"HMMA 16x8x16": 2 * 128**3 // 4096 // 8}, 1)
    assert hopper["done"] == 1 and all(name.startswith("HGMMA 64x") for name in hopper["products"])
    assert hopper["waits"] >= 1 and 1024 <= hopper["cycles"]["tensor"] < 1100
    assert set(blackwell["products"]) == {"UTCHMMA"} and blackwell["cycles"]["tensor"] == 512


def _compare(*kernels: str, report: Path) -> list[dict[str, Any]]:
    """Compile for Hopper, compare with the snapshot; the rows. Skips under another Triton than the snapshot's."""
    options = ("--check", "--target", "sm_90", "--json", report, "--kernel", *kernels)
    result = _compiling("-m", "benchmarks.aot", *options)
    if result.stdout.startswith("not compared"):
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One case of most kernels, in less than a minute."""
    cases = ("adaln[C1152", "qk_norm_rope[D128", "patch_embed[C1152", "unpatchify[K64", "[full,D128")
    return _compare(*cases, report=tmp_path_factory.mktemp("aot") / "some.json")


def test_kernels_cost_what_the_snapshot_says(some: list[dict[str, Any]]) -> None:
    """The whole table is for `make aot ARGS=--check`."""
    assert len(some) >= 12
    assert all(row["instructions"] > 100 and not Row.of(row).problem for row in some)
    assert any(row["wide_loads"] for row in some) and any(row["wide_stores"] for row in some)


def test_hot_loops_of_what_ships_are_read(some: list[dict[str, Any]]) -> None:
    attention = [row for row in some if row["kernel"].startswith("packed_attention")]
    assert len(attention) >= 3
    for loop in (loop for row in attention for loop in row["loops"]):
        assert loop["flops"] % (128 * 128) == 0 and loop["done"] == 1 and loop["barriers"] >= 1, loop
        assert 0.2 < loop["bound"] <= 1 and loop["cycles"]["tensor"] >= loop["flops"] // 4096, loop
    others = [row["loops"] for row in some if row["kernel"].startswith(("adaln", "qk_norm"))]
    assert others and all(loop["loaded"] and not loop["products"] for (loop,) in others)


@pytest.mark.slow
def test_shipped_kernels_compile_for_hopper(some: list[dict[str, Any]], tmp_path: Path) -> None:
    # One size of everything: whole tables are for `make aot`.
    others = ("gated_residual[C1152", "[full,D72", "[window,D64", "[cross,D96", "qk_norm_rope[D72")
    others += ("linear_unpatchify[C1152", "H4608")
    rows = some + _compare(*others, report=tmp_path / "aot.json")
    assert [row["kernel"] for row in rows if Row.of(row).problem] == []
    attention = [row for row in rows if row["kernel"].startswith("packed_attention")]
    assert sum(row["hgmma"] > 0 for row in attention) >= 8, attention
    compiled = {row["kernel"].split("[")[0] for row in rows}
    assert compiled == {
        "adaln",
        "gated_residual",
        "gated_residual_adaln",
        "linear_unpatchify",
        "mlp_activation",
        "packed_attention",
        "patch_embed",
        "qk_norm_rope",
        "unpatchify",
    }
