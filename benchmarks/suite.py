"""What the GPU suite knows so far, always on disk."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import Ceilings
from benchmarks.gpu_tests import Counts
from benchmarks.rows import OURS, Row, absent, failed
from benchmarks.smoke import CRASH, FAIL, OPEN, Smoke
from benchmarks.tune import Trial
from benchmarks.validation import Evidence
from sora_fast.files import write_text
from sora_fast.ops import _records
from sora_fast.ops._records import VALIDATED, Machine, Record

# In place of a device class, where nothing is proved.
DRY = "dry"
OUT_OF_TIME = "not run: out of time"
Name = tuple[str, str]


@dataclass
class Suite:
    """Everything that one call finds out, and where it is written, after every step.

    machine: that validated.json gets records of; of the device class `DRY` it touches nothing outside `folder`.
    planned: the rows (op, case) that a call should reach; of others only those that it did are told. libraries: what
    built each of the compiled ones, or why it is not there; built: those that are. trials: of launch configurations.
    earlier: records of kernels that were changed since. unreached: what else there was no time for. seconds: that each
    phase took.
    """

    folder: Path
    machine: Machine
    record: Mapping[str, Any]
    ceilings: Ceilings
    planned: list[Name] = field(default_factory=list)
    libraries: dict[str, str] = field(default_factory=dict)
    built: set[str] = field(default_factory=set)
    smoke: dict[str, Smoke] = field(default_factory=dict)
    compared: list[Row] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    tests: dict[str, Counts] = field(default_factory=dict)
    sanitizer: dict[str, Any] = field(default_factory=lambda: {"errors": None, "note": "not run"})
    earlier: list[Record] = field(default_factory=list)
    unreached: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    stopped: str = ""

    @property
    def rows(self) -> list[Row]:
        """Also of what has not been reached."""
        found = {(row.op, row.case) for row in self.compared}
        return [*self.compared, *(failed(*name, OUT_OF_TIME) for name in self.planned if name not in found)]

    def save(self) -> None:
        """suite.json and validated.json, each whole or not at all."""
        rows = self.rows
        content = {
            "environment": self.record,
            "ceilings": asdict(self.ceilings),
            "seconds": self.seconds,
            "libraries": self.libraries,
            "smoke": [asdict(smoke) for smoke in self.smoke.values()],
            "tests": {name: asdict(counts) for name, counts in self.tests.items()},
            "sanitizer": self.sanitizer,
            "stopped": self.stopped,
            "unreached": self.unreached,
            "absent": dict(absent(rows)),
            "rows": [row.record() for row in rows],
            "trials": [asdict(trial) for trial in self.trials],
        }
        write_text(self.folder / "suite.json", json.dumps(content, indent=1) + "\n")
        self._save_validated()

    def _save_validated(self) -> None:
        """Replace the records of this kind of device, of the ops that more is known of now, and keep all others."""
        settled, earlier = self._settled(), [] if self.sanitizer["errors"] else self.earlier
        known = _records.read_list(VALIDATED)
        kept = [
            r for r in known if r.machine.device_class != self.machine.device_class or (r.op, r.backend) not in settled
        ]
        text = _records.written(list(dict.fromkeys([*kept, *earlier, *self.validated()])))
        write_text(self.folder / "validated.json", text)
        if self.machine.device_class != DRY and self.smoke:
            write_text(VALIDATED, text)

    def _settled(self) -> set[Name]:
        """The ops, each with a backend, that all smoke is known of, or something that is wrong: a look that was cut
        short says nothing."""
        smoke = self.smoke.values()
        known = {(one.op, one.backend) for one in smoke}
        if self.sanitizer["errors"]:
            return known
        slow = {row.op for row in self.compared if is_wrong(row)}
        wrong = {(one.op, one.backend) for one in smoke if one.status in (FAIL, CRASH) or one.op in slow}
        return wrong | (known - {(one.op, one.backend) for one in smoke if one.status == OPEN})

    def validated(self) -> list[Record]:
        """Nothing, if memcheck found anything: it does not say in which op. Nothing of a dry walk either."""
        if self.sanitizer["errors"] or self.machine.device_class == DRY:
            return []
        smoke = list(self.smoke.values())
        return Evidence(smoke, self.compared, self.tests, self.record, self.machine).records()

    def changed(self, op: str, before: Sequence[Record], smoke: Mapping[str, Smoke]) -> None:
        """The kernels of `op` are others from now on. before: what held for those that they were; smoke: to be made."""
        self.earlier += [record for record in before if record.op == op]
        self.smoke |= smoke
        _records.source_hash.cache_clear()

    @property
    def failed(self) -> bool:
        """Whether anything is wrong; time that ran out is not."""
        smoke = any(one.status in (FAIL, CRASH) for one in self.smoke.values())
        tests = any(counts.failed for counts in self.tests.values())
        return bool(smoke or tests or any(map(is_wrong, self.compared)) or self.sanitizer["errors"])

    def open(self, phase: str, names: Sequence[str]) -> None:
        """There was no time for these."""
        if names:
            self.unreached[phase] = list(names)


def is_wrong(row: Row) -> bool:
    """A failure, or a backend of ours that is too far from the truth."""
    return bool(row.failure) or not all(row.agrees(name) for name in row.rounds if name in OURS)
