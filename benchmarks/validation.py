"""Which backends the GPU suite lets be chosen by default from now on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_tests import Counts
from benchmarks.rows import Row
from benchmarks.smoke import PASS, Smoke
from sora_fast.ops._checks import KERNEL_DTYPES
from sora_fast.ops._records import ANY_DTYPE, BY_CASES, BY_TESTS, Machine, Record, dtype_name, source_hash


@dataclass(frozen=True)
class Evidence:
    """What is known of the kernels on a machine. rows: of larger batches, as far as there are any: a wrong offset or an
    overflow shows there."""

    smoke: Sequence[Smoke]
    rows: Sequence[Row]
    tests: Mapping[str, Counts]
    environment: Mapping[str, Any]
    machine: Machine

    def records(self) -> list[Record]:
        """Of every op and dtype that passed all of its smoke; of all dtypes where every test marked `gpu` passed too,
        of Triton's kernels (others are few, and proved where they are built).

        Nothing of kernels of which anything is wrong, wherever it was seen.
        """
        kernels = dict.fromkeys((smoke.op, smoke.backend) for smoke in self.smoke)
        return [
            record for op, backend in kernels if not self._is_wrong(op, backend) for record in self._of(op, backend)
        ]

    def _counts(self, op: str, backend: str) -> Counts:
        return self.tests.get(op, Counts()) if backend == "triton" else Counts()

    def _is_wrong(self, op: str, backend: str) -> bool:
        larger = [row for row in self.rows if row.op == op and backend not in row.absent]
        wrong = any(row.failure or not row.agrees(backend) for row in larger)
        return bool(self._counts(op, backend).failed) or wrong

    def _of(self, op: str, backend: str) -> Iterator[Record]:
        smoke = [smoke for smoke in self.smoke if (smoke.op, smoke.backend) == (op, backend)]
        if any(one.status != PASS for one in smoke):
            return
        counts = self._counts(op, backend)
        all_tests = counts.complete and counts.passed > 0
        dtypes = list(dict.fromkeys(one.dtype for one in smoke))
        if all_tests and dtypes != [ANY_DTYPE]:
            dtypes = [dtype_name(dtype) for dtype in KERNEL_DTYPES]
        larger = sum(row.op == op for row in self.rows)
        tests = f", {counts.passed} tests passed" if all_tests else ", not all of its tests were run"
        for dtype in dtypes:
            yield Record(
                op=op,
                backend=backend,
                dtype=dtype,
                machine=self.machine,
                source=source_hash(op) if backend == "triton" else source_hash(op, backend),
                passed=True,
                cases=len(smoke) + larger,
                device=self.environment["device"],
                date=self.environment["date"],
                note=f"benchmarks.gpu_suite at {self.environment['commit']}{tests}",
                checked=BY_TESTS if all_tests else BY_CASES,
            )
