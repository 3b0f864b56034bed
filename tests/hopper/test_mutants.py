"""Every seeded fault of the forward kernel is caught, or listed as harmless: see mutants.py.

By default some of each kind, since each is compiled; EXAMPLES=2 tries all (six minutes on one core).
"""

import pytest

from tests.helpers import examples
from tests.hopper.emulated import SOURCES
from tests.hopper.mutants import MUTANTS, Mutant, judge

# As the kernel is, compiled without optimization: whatever differs in a mutant is the mutant's.
NOTHING = Mutant("nothing", "layout.h", ("#pragma once",), ("#pragma once",))
ALWAYS = [
    "first scores: not waited for",
    "V: waited for as it lands, not as it is mended",
    "output: no fence",
    "V let go before the wait",
    "Q let go a step early",
    "turns: given once too often",
    "mending: no proxy fence",
    "mending: the last row is left",
    "K: half of its bytes expected",
    "tail: one key too many",
    "places: of one key too many",
    "items: the last turn is left out",
    "release: before all lanes are there",
    "descriptor of columns: distances exchanged",
    "registers: too many for the producers",
    "scores: not committed",
]
FAULTS = [name for name, mutant in MUTANTS.items() if not mutant.harmless]
HARMLESS = [name for name, mutant in MUTANTS.items() if mutant.harmless]
ALL = examples(1).max_examples > 1


def test_mutants_apply() -> None:
    for mutant in MUTANTS.values():
        source = (SOURCES / "hopper" / mutant.file).read_text()
        assert mutant.edit(source) != source


def test_nothing_is_caught_where_nothing_is_wrong() -> None:
    assert not judge(NOTHING).kind


@pytest.mark.parametrize("name", FAULTS if ALL else ALWAYS)
def test_a_fault_is_caught(name: str) -> None:
    assert judge(MUTANTS[name]).kind


@pytest.mark.parametrize("name", HARMLESS if ALL else HARMLESS[:1])
def test_what_is_harmless_is(name: str) -> None:
    verdict = judge(MUTANTS[name])
    assert not verdict.kind, verdict
