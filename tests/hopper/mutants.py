"""Seeded faults of the forward kernel: each is an edit of its source (mutants.diff) that the tests must notice.

    python -m tests.hopper.mutants [WORDS]        a table: what catches those whose names contain WORDS, and how

A mutant is compiled in the few forms that the cases below need, and run in a child process, which it may take down.
"""

import multiprocessing
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.packing import PackedLayout
from tests.hopper.cases import NAN, Case
from tests.hopper.emulated import (
    SOURCES,
    Emulated,
    EmulatedFault,
    Library,
    compile_object,
    emulator_objects,
    library,
    link,
)

FORMS = "FORM(bf16, full, 64) FORM(bf16, boxes, 128) FORM(bf16, causal_boxes, 80)"
SEEDS = 4
_SECONDS = 120.0


@dataclass(frozen=True)
class Mutant:
    """The lines `old`, which stand exactly once in a file of csrc/hopper, become `new`.

    harmless: why nothing can notice it; a mutant without that must be caught.
    """

    name: str
    file: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    harmless: str = ""

    def edit(self, source: str) -> str:
        """Raises ValueError if the source has changed so that the fault cannot be seeded any more."""
        old, new = ("".join(f"\n{line}" for line in lines) + "\n" for lines in (self.old, self.new))
        if (count := source.count(old)) != 1:
            raise ValueError(f"{self.name}: its lines stand {count} times in {self.file}; write the mutant anew:{old}")
        return source.replace(old, new)


@dataclass(frozen=True)
class Verdict:
    """kind: what caught it ("fault", "deadlock", "NaN", "wrong", "bits", "crash", "hang"), or "" if nothing did."""

    kind: str
    case: str = ""
    seed: int = 0
    message: str = ""


_WINDOW = SpacetimeMask.window(1, 2, 3)
_TEXT = PackedLayout.from_grids([(n, 1, 1) for n in (260, 0, 137, 1)], capacity=400)
CASES = {
    # A last step of 52 keys before NaN, three stages, two heads that share keys.
    "full": Case(PackedLayout.from_grids([(3, 6, 10), (1, 1, 3), (2, 5, 5)], capacity=260), group=2),
    # Items without keys between others; the second warpgroup without queries, of 64 exactly; an item of three steps.
    "cross": Case(PackedLayout.from_grids([(n, 1, 1) for n in (140, 9, 64, 3)]), kv_layout=_TEXT, heads=2),
    # More tiles than a warp has lanes and than a block takes at a time; fewer than the layout has room for.
    "many": Case(
        PackedLayout.from_grids([(1, 1, 1 + n % 2) for n in range(40)], tile_size=16, capacity=64), head_dim=8
    ),
    # As many tiles as the layout has room for.
    "one": Case(PackedLayout.from_grids([(1, 5, 8)]), head_dim=8),
    # Lists of tiles of 64 and fewer, two halves of a row of which one is not full, two stages.
    "boxes": Case(
        PackedLayout.from_grids([(4, 6, 10), (1, 3, 3)], order="tiled", tile_size=64), _WINDOW, head_dim=104, group=2
    ),
    # Coordinates past 256 along each axis; tiles of up to 128.
    "long": Case(
        PackedLayout.from_grids([(1, 290, 1), (2, 3, 3), (3, 1, 270)], order="tiled", capacity=1120),
        SpacetimeMask.window(1, 2, 3),
        head_dim=128,
    ),
    # Ranges of tokens: steps that are met entirely, and that must be asked.
    "tokens": Case(
        PackedLayout.from_grids([(3, 9, 12), (1, 2, 2), (2, 3, 5)]), SpacetimeMask.token_causal(), head_dim=72
    ),
}


@cache
def _inputs(name: str) -> list[Tensor]:
    """With NaN in every other segment, so that a key too many is seen."""
    case = CASES[name]
    qkv = case.inputs()
    sides = (case.layout, case.keys, case.keys)
    return [x.masked_fill((side.segment_ids % 2 == 1)[:, None, None], NAN) for x, side in zip(qkv, sides, strict=True)]


def attend(name: str, kernels: Library, seed: int) -> Emulated:
    case = CASES[name]
    return kernels.attention(*_inputs(name), case.schedule(), seed=seed, blocks=2 + seed % 2)


@cache
def _expected(name: str) -> Emulated:
    return attend(name, library(), 0)


def build(mutant: Mutant, folder: Path) -> Path:
    """The mutant's library. Raises CalledProcessError if it does not compile."""
    for part in ("hopper", "emulator", "emulated"):
        shutil.copytree(SOURCES / part, folder / part)
    source = folder / "hopper" / mutant.file
    source.write_text(mutant.edit(source.read_text()))
    compiled, target = folder / "kernel.o", folder / "libmutant.so"
    compile_object(folder / "emulated" / "attention_forward.cpp", compiled, "-O0", "-w", f"-DEMULATED_FORMS={FORMS}")
    link([compiled, *emulator_objects()], target)
    return target


def judge(mutant: Mutant) -> Verdict:
    """Build and run it: the first case and seed in which something is wrong."""
    for name in CASES:
        _expected(name)  # before the child is there
    with tempfile.TemporaryDirectory() as folder:
        kernels = build(mutant, Path(folder))
        return _in_child(lambda: _first_difference(Library(kernels)))


def _first_difference(kernels: Library) -> Verdict:
    for seed in range(SEEDS):
        for name in CASES:
            try:
                found = attend(name, kernels, seed)
            except EmulatedFault as fault:
                return Verdict("deadlock" if "deadlock" in str(fault) else "fault", name, seed, str(fault))
            if kind := _difference(found, _expected(name)):
                return Verdict(kind, name, seed)
    return Verdict("")


def _difference(found: Emulated, expected: Emulated) -> str:
    kinds = set()
    for a, b in ((found.out, expected.out), (found.lse, expected.lse)):
        a, b = a.float(), b.float()
        known = ~b.isnan()
        if a[known].isnan().any():
            kinds.add("NaN")
        elif not torch.allclose(a[known], b[known], rtol=1e-2, atol=1e-2):
            kinds.add("wrong")
        elif not (torch.equal(a[known], b[known]) and a[~known].isnan().all()):
            kinds.add("bits")
    return next((kind for kind in ("NaN", "wrong", "bits") if kind in kinds), "")


def _in_child(run: Callable[[], Verdict]) -> Verdict:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(run()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other threads: the child takes no lock of theirs
        child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(_SECONDS) else Verdict("hang")
    except EOFError:
        return Verdict("crash")
    finally:
        child.kill()
        child.join()


def read(text: str) -> Iterator[Mutant]:
    """Of mutants.diff: "--- file" of csrc/hopper, and for each mutant "@ name", "~ why it is harmless", and lines as in
    a diff: " " stays, "-" goes, "+" comes."""
    file = ""
    for part in re.split(r"^(?=--- |@ )", text, flags=re.MULTILINE):
        head, *lines = part.splitlines() or [""]
        if head.startswith("--- "):
            file = head.removeprefix("--- ")
        elif head:
            by_sign = [(line[0], line[1:]) for line in lines if line]
            old, new = (tuple(line for sign, line in by_sign if sign in signs) for signs in (" -", " +"))
            harmless = " ".join(line.strip() for sign, line in by_sign if sign == "~")
            yield Mutant(head.removeprefix("@ "), file, old, new, harmless)


MUTANTS = {mutant.name: mutant for mutant in read(Path(__file__).with_name("mutants.diff").read_text())}


def main(words: str = "") -> int:
    """The number of mutants that were not caught, or were but are said to be harmless."""
    wrong = 0
    for mutant in MUTANTS.values():
        if words not in mutant.name:
            continue
        verdict = judge(mutant)
        wrong += bool(verdict.kind) == bool(mutant.harmless)
        kind = verdict.kind or ("harmless" if mutant.harmless else "NOT CAUGHT")
        print(f"| {mutant.name} | {kind} | {verdict.case} | {(mutant.harmless or verdict.message)[:160]} |", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
