"""Every seeded fault of the forward kernel is caught, or listed as harmless: see mutants.py."""

import pytest

from tests.hopper.emulated import SOURCES
from tests.hopper.mutants import MUTANTS, Mutant, judge

# As the kernel is, compiled without optimization: whatever differs in a mutant is the mutant's.
NOTHING = Mutant("nothing", "layout.h", ("#pragma once",), ("#pragma once",))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_applies(name: str) -> None:
    mutant = MUTANTS[name]
    source = (SOURCES / "hopper" / mutant.file).read_text()
    assert mutant.edit(source) != source


def test_nothing_is_caught_where_nothing_is_wrong() -> None:
    assert judge(NOTHING).kind == ""


@pytest.mark.parametrize("name", [name for name, mutant in MUTANTS.items() if not mutant.harmless])
def test_a_fault_is_caught(name: str) -> None:
    assert judge(MUTANTS[name]).kind


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, mutant in MUTANTS.items() if mutant.harmless])
def test_what_is_harmless_is(name: str) -> None:
    verdict = judge(MUTANTS[name])
    assert not verdict.kind, verdict
