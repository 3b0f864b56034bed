"""What the GPU suite knows so far, always on disk."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import Ceilings
from benchmarks.gpu_tests import Counts
from benchmarks.rows import OURS, Row, absent, failed, table
from sora_fast.ops import _records
from sora_fast.ops._checks import KERNEL_DTYPES
from sora_fast.ops._records import VALIDATED, Machine, Record, dtype_name, source_hash

# In place of a device class, where nothing is proved.
DRY = "dry"
_OUT_OF_TIME = "not run: out of time"
Name = tuple[str, str]


@dataclass
class Suite:
    """Everything that one call finds out, and where it is written, after every step.

    machine: that validated.json gets records of; of the device class `DRY` it touches nothing outside `folder`.
    cases: rows of the cases that validate an op, which are `expected` (op, case). compared: rows beside the peers.
    """

    folder: Path
    machine: Machine
    record: dict[str, Any]
    ceilings: Ceilings
    expected: list[Name] = field(default_factory=list)
    planned: list[Name] = field(default_factory=list)
    tests: dict[str, Counts] = field(default_factory=dict)
    sanitizer: dict[str, Any] = field(default_factory=lambda: {"errors": None, "note": _OUT_OF_TIME})
    cases: list[Row] = field(default_factory=list)
    compared: list[Row] = field(default_factory=list)
    stopped: str = ""

    @property
    def rows(self) -> list[Row]:
        """Also of what has not been reached."""
        return [*_whole(self.compared, self.planned), *_whole(self.cases, self.expected)]

    def save(self) -> None:
        """suite.json, whole or not at all."""
        rows = self.rows
        content = {
            "environment": self.record,
            "ceilings": asdict(self.ceilings),
            "tests": {name: asdict(counts) for name, counts in self.tests.items()},
            "sanitizer": self.sanitizer,
            "stopped": self.stopped,
            "absent": dict(absent(rows)),
            "rows": [row.record() for row in rows],
        }
        _write(self.folder / "suite.json", json.dumps(content, indent=1) + "\n")

    def save_validated(self) -> None:
        """Replace the records of this kind of device, of the ops that were looked at, and keep all others."""
        looked_at = {op for op, _ in self.expected}
        known = _records.read_list(VALIDATED)
        kept = [r for r in known if r.machine.device_class != self.machine.device_class or r.op not in looked_at]
        text = _records.written([*kept, *self.validated()])
        _write(self.folder / "validated.json", text)
        if self.machine.device_class != DRY:
            _write(VALIDATED, text)

    def validated(self) -> list[Record]:
        """Nothing, if memcheck found anything: it does not say in which op."""
        if self.sanitizer["errors"]:
            return []
        # What is compared may be larger than the cases, and its numbers count as much where there are any.
        larger = [row for row in self.compared if row.errors]
        rows = [*_whole(self.cases, self.expected), *larger]
        return validate(self.tests, rows, self.record, self.machine)

    def summary(self) -> str:
        """For the terminal; short, and the table comes last."""
        lines = ["", *self._of_tests(), *self._of_cases()]
        lines += [
            f"at best: {self.ceilings.gigabytes_per_second:.0f} GB/s copied, {self.ceilings.teraflops:.1f} TFLOP/s"
        ]
        lines += [f"absent: {name}: {reason.splitlines()[0][:100]}" for name, reason in absent(self.compared)]
        late = [f"{row.op}[{row.case}]" for row in self.rows if row.failure == _OUT_OF_TIME]
        lines += [f"not reached: {', '.join(late)}"] if late else []
        lines += [f"stopped: {self.stopped}"] if self.stopped else []
        return "\n".join([*lines, "", table(self.compared, self.ceilings)])

    def _of_tests(self) -> Iterator[str]:
        failures = ", ".join(name for name, counts in self.tests.items() if counts.failed)
        yield f"tests: {sum(counts.passed for counts in self.tests.values())} passed; failures in: {failures or 'none'}"
        if unfinished := ", ".join(name for name, counts in self.tests.items() if not counts.complete):
            yield f"not all tests were run of: {unfinished}"
        yield f"sanitizer: {self.sanitizer['errors']} errors ({self.sanitizer['note']})"

    def _of_cases(self) -> Iterator[str]:
        yield f"validated: {', '.join(dict.fromkeys(record.op for record in self.validated())) or 'none'}"
        for op in dict.fromkeys(row.op for row in self.cases):
            rows = [row for row in self.cases if row.op == op]
            times = [row.times for row in rows if "triton" in row.rounds]
            ratios = [time["torch"].median / time["triton"].median for time in times]
            if ratios:
                yield f"{op}: triton {min(ratios):.2f} to {max(ratios):.2f}× as fast as torch over {len(ratios)} passes"
        for row in filter(_is_wrong, [*self.cases, *self.compared]):
            yield f"WRONG: {row.op}[{row.case}], {row.direction}: {row.failure or row.errors}"[:400]

    @property
    def failed(self) -> bool:
        """Whether anything is wrong; time that ran out is not."""
        tests = any(counts.failed for counts in self.tests.values())
        rows = any(_is_wrong(row) for row in self.rows if row.failure != _OUT_OF_TIME)
        return bool(tests or rows or self.sanitizer["errors"])


def _is_wrong(row: Row) -> bool:
    """A failure, or a backend of ours that is too far from the truth."""
    return bool(row.failure) or not all(row.agrees(name) for name in row.rounds if name in OURS)


def validate(
    tests: dict[str, Counts], rows: Sequence[Row], environment: dict[str, Any], machine: Machine
) -> list[Record]:
    """A record a dtype of every op and backend whose tests passed and whose cases all ran and agreed with fp64.

    The tests are small, and of all dtypes; the cases are as large as real batches, where a wrong offset or an overflow
    would show.
    """
    records = []
    for op in dict.fromkeys(row.op for row in rows):
        counts, cases = tests.get(op, Counts()), [row for row in rows if row.op == op]
        if counts.failed or not counts.passed or not counts.complete or any(row.failure for row in cases):
            continue
        for backend in sorted(cases[0].rounds.keys() & OURS.keys() - {"torch"}):
            if all(row.agrees(backend) for row in cases):
                note = f"benchmarks.gpu_suite at {environment['commit']}, {counts.passed} tests passed"
                same = {"op": op, "backend": backend, "machine": machine, "source": source_hash(op), "note": note}
                same |= {"device": environment["device"], "date": environment["date"]}
                dtypes = (None,) if op == "schedule" else KERNEL_DTYPES
                records += [Record(dtype=dtype_name(d), passed=True, cases=len(cases), **same) for d in dtypes]
    return records


def _whole(rows: Sequence[Row], names: Sequence[Name]) -> list[Row]:
    """`rows`, and one for each of `names` that is not among them."""
    found = {(row.op, row.case) for row in rows}
    return [*rows, *(failed(*name, _OUT_OF_TIME) for name in names if name not in found)]


def _write(file: Path, text: str) -> None:
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(file)
