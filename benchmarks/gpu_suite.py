"""Prove and time everything on a GPU, in one call, without a network.

    python -m benchmarks.gpu_suite --out DIR [--minutes 9] [--dry]

Runs from a checkout, installed or not: the tests marked `gpu`, then every case of benchmarks/cases.py on each
backend against PyTorch. Writes to DIR: tests.xml and tests.log (pytest), suite.json (everything measured) and
validated.json, the backends that are from now on chosen by default on this kind of GPU, because their op's tests
passed and its cases agreed with PyTorch. That file also replaces the one in sora_fast/ops/. The table comes last.
--dry walks the same way small, interpreted where there is no GPU, and touches nothing outside DIR.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import _checkout
from benchmarks.environment import Ceilings, environment
from benchmarks.gpu_tests import Counts, run_gpu_tests

if TYPE_CHECKING:
    from benchmarks.rows import Row

VALIDATED = _checkout.ROOT / "sora_fast" / "ops" / "validated.json"
# Share of the minutes that the tests may take; the rest is for the timings.
_TESTS_SHARE = 0.6


def validate(tests: dict[str, Counts], rows: "Sequence[Row]", record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{op: {backend: record}} for every op whose tests passed and whose cases all ran and agreed with PyTorch.

    The tests are small; the cases are as large as real batches, where a wrong offset or an overflow would show.
    """
    kept = {name: record[name] for name in ("commit", "torch", "triton", "date", "device")}
    validated: dict[str, dict[str, Any]] = {}
    for op in dict.fromkeys(row.op for row in rows):
        counts, cases = tests.get(op, Counts()), [row for row in rows if row.op == op]
        if counts.failed or not counts.passed or any(row.failure for row in cases):
            continue
        for backend in sorted(cases[0].times.keys() - {"torch"}):
            if all(row.agrees(backend) for row in cases):
                validated.setdefault(op, {})[backend] = {**kept, "tests_passed": counts.passed}
    return validated


def run(folder: Path, *, seconds: float, dry: bool, commit: str | None = None) -> int:
    """The whole suite; 0 if every test passed and every case ran."""
    from benchmarks.rows import measure_all, table
    from sora_fast.ops._dispatch import device_class

    deadline = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = environment(commit)
    print(json.dumps(record, indent=1))

    tests = run_gpu_tests(folder, seconds * _TESTS_SHARE)
    ceilings = Ceilings.measure(device)
    rows = measure_all(device, small=dry, deadline=deadline)
    validated = validate(tests, rows, record)
    suite = {
        "environment": record,
        "ceilings": asdict(ceilings),
        "tests": {name: asdict(counts) for name, counts in tests.items()},
        "rows": [asdict(row) for row in rows],
    }
    (folder / "suite.json").write_text(json.dumps(suite, indent=1) + "\n")
    _write_validated(folder, validated, "dry" if dry else device_class(device))

    failed = sorted(name for name, counts in tests.items() if counts.failed)
    print(f"\ntests: {sum(t.passed for t in tests.values())} passed; failures in: {', '.join(failed) or 'none'}")
    print(f"at best: {ceilings.gigabytes_per_second:.0f} GB/s copy, {ceilings.teraflops:.1f} TFLOP/s product")
    print(f"validated: {', '.join(validated) or 'none'}\n")
    print(table(rows, ceilings))
    return 1 if failed or any(row.failure for row in rows) else 0


def _write_validated(folder: Path, validated: dict[str, Any], kind: str) -> None:
    """Replace the records of this kind of device ("dry" touches nothing outside `folder`), and keep the others'."""
    known = json.loads(VALIDATED.read_text()) if VALIDATED.exists() else {}
    merged = {**known, kind: validated}
    text = json.dumps(merged, indent=1, sort_keys=True) + "\n"
    (folder / "validated.json").write_text(text)
    if kind != "dry":
        VALIDATED.write_text(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results are written")
    parser.add_argument("--minutes", type=float, default=9, help="end within this time (default: 9)")
    parser.add_argument("--dry", action="store_true", help="walk through it small, on a CPU too")
    parser.add_argument("--commit", help="commit to record, where the checkout carries no git data")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        if not options.dry:
            parser.error("there is no CUDA device here; --dry walks through the suite on a CPU")
        os.environ["TRITON_INTERPRET"] = "1"
    _checkout.make_importable()
    return run(options.out, seconds=60 * options.minutes, dry=options.dry, commit=options.commit)


if __name__ == "__main__":
    sys.exit(main())
