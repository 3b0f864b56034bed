"""What nvcc makes of the kernels for Hopper: nothing spilled, nothing said by ptxas, and that it would be seen."""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from benchmarks.aot_cuda import (
    FILE,
    FORMS,
    Compiled,
    beside_triton,
    compile_form,
    differences,
    load,
    read,
    save,
    version,
)
from csrc.build import ROOT, Unavailable
from tests.helpers import examples
from tests.hopper.mutants import MUTANTS

BY_NAME = {form.name: form for form in FORMS}
FULL, LARGEST = "attention_forward[full,D64]", "attention_forward[causal_boxes,D128]"
# EXAMPLES=2: all of them, some four minutes on one core.
NAMES = list(BY_NAME) if examples(1).max_examples > 1 else [FULL, LARGEST]


@cache
def compiled(name: str, sources: Path = ROOT) -> Compiled:
    try:
        return compile_form(BY_NAME[name], sources)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_what_the_snapshot_says(name: str) -> None:
    row = compiled(name)
    assert not row.problem
    nvcc, rows = load(FILE)
    if nvcc != version():
        pytest.skip(f"the snapshot is of nvcc {nvcc}, this is {version()}")
    assert list(differences([known for known in rows if known.name == name], [row])) == []


def test_the_loop_of_a_kernel_is_read() -> None:
    row = compiled(FULL)
    # 168 a thread at launch is what the block divides anew among its warps.
    assert row.registers == 168 and row.budgets.keys() == {"40", "232"}
    # Four steps for the scores of 128 keys, eight for the output; the first and the last stand outside of the loop.
    assert row.products == {"64x128x16": 2 * 4, "64x64x16": 2 * 8}
    assert row.tma >= 3
    (loop,) = row.loops
    assert loop.products == {"HGMMA 64x128x16": 4, "HGMMA 64x64x16": 8} and loop.waits == 2 and not loop.local


def test_ptxas_tells_of_a_wait_that_is_missing(tmp_path: Path) -> None:
    mutant = MUTANTS["output rescaled while a product owns it"]
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns("__pycache__"))
    file = sources / "hopper" / mutant.file
    file.write_text(mutant.edit(file.read_text()))
    assert any(warning.startswith("C75") for warning in compiled(FULL, sources).warnings)


def test_spills_and_stack_are_problems() -> None:
    said = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Function properties for f
    48 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
    sass = "\tFunction : f\n        /*0000*/                   EXIT ;\n"
    row = read("f", said, sass)
    assert (row.registers, row.spills, row.stack) == (168, 16, 48)
    assert replace(row, budgets={"40": 41, "232": 232}).problem.startswith("C7510; 41 registers of 40; spills")
    assert row.problem == "C7510; spills 16 bytes a thread, and has a stack of 48"


def test_the_snapshot_holds_no_problem() -> None:
    nvcc, rows = load(FILE)
    assert nvcc and {row.name for row in rows} <= {form.name for form in FORMS}
    assert {form.name for form in FORMS if form.kernel == "attention_forward"} <= {row.name for row in rows}
    assert [row.name for row in rows if row.problem] == []
    lines = list(beside_triton(rows))
    assert len(lines) == 12 and all(line[1].isdigit() for line in lines)


def test_the_snapshot_is_read_as_it_was_written(tmp_path: Path) -> None:
    nvcc, rows = load(FILE)
    save(tmp_path / "copy.json", nvcc, rows)
    assert load(tmp_path / "copy.json") == (nvcc, rows)
    changed = [replace(rows[0], registers=1), *rows[2:]]
    assert list(differences(rows, changed)) == [
        f"{rows[0].name}: registers {rows[0].registers} → 1",
        f"{rows[1].name}: vanished",
    ]
