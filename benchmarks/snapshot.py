"""The ahead-of-time table as the repository keeps it: what every kernel cost when it was last looked at.

One line a row, sorted, so that a change of one kernel is a change of one line. Counts depend on the compiler, so the
file names the version of Triton that made it and is compared under that version only.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks._checkout import ROOT
from benchmarks.hot_loop import Loop

FILE = ROOT / "benchmarks" / "results" / "aot.json"
# The largest dynamic shared memory of one block, in bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
# Of a hot loop's instructions, those that may go to spilled registers. Blocks small enough to spill nothing cost
# attention more: past head dim 128 half the rate of the matrix instructions, up to it a third more instructions.
SPILLED_SHARE = 1 / 16


@dataclass(frozen=True)
class Row:
    """One kernel on one target. registers: a thread's; spills: bytes a thread; the rest counts instructions.

    loops: its hot ones, as `hot_loop.read_loops` finds them; None in a file from before they were read.
    """

    kernel: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    instructions: int
    hgmma: int
    wide_loads: int
    wide_stores: int
    loops: tuple[Loop, ...] | None = None

    @staticmethod
    def of(content: dict[str, Any]) -> "Row":
        """From what `asdict` makes of one. Raises TypeError if it is something else."""
        loops = content.get("loops")
        return Row(**{**content, "loops": loops if loops is None else tuple(Loop(**loop) for loop in loops)})

    @property
    def problem(self) -> str:
        limit = SHARED_LIMIT[self.target]
        if self.shared_bytes > limit:
            return f"wants more shared memory than {limit} bytes"
        return f"spills {self.spills} bytes a thread" if self.spills and not self._spills_outside else ""

    @property
    def _spills_outside(self) -> bool:
        """Whether the loops with products, which take the time, have next to nothing to do with what is spilled."""
        loops = self.loops or ()
        return bool(loops) and all(x.products and x.local <= SPILLED_SHARE * x.instructions for x in loops)


@dataclass(frozen=True)
class Selection:
    """Some targets, and kernels whose names contain one of `parts` (every kernel if there are none)."""

    targets: Sequence[str]
    parts: Sequence[str] = ()

    @property
    def everything(self) -> bool:
        return set(self.targets) == SHARED_LIMIT.keys() and not self.parts

    def names(self, kernel: str) -> bool:
        return not self.parts or any(part in kernel for part in self.parts)

    def __contains__(self, row: Row) -> bool:
        return row.target in self.targets and self.names(row.kernel)


@dataclass(frozen=True)
class Snapshot:
    """Rows, and the version of Triton that compiled them."""

    triton: str
    rows: tuple[Row, ...]

    @staticmethod
    def read(file: Path) -> "Snapshot | None":
        """None if there is none yet. Raises ValueError if the file is something else."""
        if not file.exists():
            return None
        try:
            content = json.loads(file.read_text())
            return Snapshot(content["triton"], tuple(map(Row.of, content["rows"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no snapshot ({error}); remove it, then --update writes one") from error

    def write(self, file: Path) -> None:
        """Whole or not at all, so that an interrupted update leaves the last good file."""
        rows = [json.dumps(asdict(row)) for row in sorted(self.rows, key=_identity)]
        text = f'{{"triton": {json.dumps(self.triton)}, "rows": [\n' + ",\n".join(rows) + "\n]}\n"
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(text)
        unfinished.replace(file)

    def with_rows(self, rows: Iterable[Row], selection: Selection) -> "Snapshot":
        """`rows` in place of whatever `selection` covers."""
        kept = [row for row in self.rows if row not in selection]
        return Snapshot(self.triton, (*kept, *rows))

    def differences(self, rows: Iterable[Row], selection: Selection) -> Iterator[str]:
        """What has changed within `selection` from this snapshot to `rows`, a line each."""
        before = {_identity(row): row for row in self.rows if row in selection}
        after = {_identity(row): row for row in rows}
        for key in sorted(before.keys() | after.keys()):
            name = f"{key[0]} on {key[1]}"
            if key not in after:
                yield f"{name}: vanished"
            elif key not in before:
                yield f"{name}: new"
            else:
                changes = ", ".join(_changes(before[key], after[key]))
                if changes:
                    yield f"{name}: {changes}"


def _changes(before: Row, after: Row) -> Iterator[str]:
    old, new = _flat(before), _flat(after)
    if before.loops is None:  # nothing to compare with
        new = {what: new[what] for what in old}
    for what in dict.fromkeys([*old, *new]):
        if old.get(what) != new.get(what):
            yield f"{what} {old.get(what, 'none')} → {new.get(what, 'none')}"


def _flat(row: Row) -> dict[str, Any]:
    """What a row says, each of its loops' numbers under a name of its own."""
    found = asdict(row)
    for place, loop in enumerate(found.pop("loops") or (), 1):
        for group in ("cycles", "products"):
            found |= {f"loop {place}: {what}": count for what, count in loop.pop(group).items()}
        found |= {f"loop {place}: {what}": value for what, value in loop.items()}
    return found


def _identity(row: Row) -> tuple[str, str]:
    return row.kernel, row.target
