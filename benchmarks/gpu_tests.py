"""The tests marked `gpu` as processes that run side by side, and what they say op by op."""

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.jobs import Job

# Processes an op: enough that the longest, attention, fills a dozen cores.
_SHARDS = 4
_OTHERS = "others"


@dataclass
class Counts:
    """Tests of one op, or of one other file. complete: none is missing because a process did not come to its end."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    complete: bool = True


def jobs_of_tests(folder: Path, ops: Sequence[str], *, others: bool, shards: int = _SHARDS) -> list[Job]:
    """Processes for the tests of `ops`, in that order, then for all that belong to no op if `others` is asked for."""
    files = {op: f"tests/ops/test_{op}.py" for op in ops}
    jobs = [_job(folder, op, [file], place, shards) for op, file in files.items() for place in range(shards)]
    if others:
        jobs.append(_job(folder, _OTHERS, ["tests", *(f"--ignore={file}" for file in files.values())], 0, 1))
    return jobs


def _job(folder: Path, op: str, arguments: Sequence[str], place: int, shards: int) -> Job:
    name = f"{op}-{place}"
    report = folder / f"{name}.xml"
    report.unlink(missing_ok=True)  # of an earlier call, whose passes are not this one's
    options = [
        "-m",
        "gpu",
        "-q",
        "-p",
        "benchmarks.shard",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        f"--junitxml={report}",
    ]
    # Inductor would otherwise fork a pool of compilers in every process.
    environment = {"SORA_FAST_SHARD": f"{place}/{shards}", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *arguments, *options]
    return Job(name, command, folder / f"{name}.log", environment)


def read_results(folder: Path, jobs: Sequence[Job], codes: Mapping[str, int]) -> dict[str, Counts]:
    """Counts by op, and by module for what belongs to no op. codes: as `run_jobs` gives them for `jobs`."""
    results: dict[str, Counts] = {}
    for job in jobs:
        op, report = job.name.rsplit("-", 1)[0], folder / f"{job.name}.xml"
        ended = codes.get(job.name) in (0, 1, 5) and report.exists()  # 5: no test was left for this process
        if ended:
            _add(results, report)
        if not ended or op != _OTHERS:
            counts = results.setdefault(op, Counts())
            counts.complete &= ended
            # Out of time it has no exit code at all; any other is a crash.
            counts.failed += not ended and job.name in codes
    return results


def _add(results: dict[str, Counts], report: Path) -> None:
    """Those of tests/ops/test_<op>.py under the op's name, others under their module's."""
    for test in ElementTree.parse(report).iter("testcase"):
        # A file that cannot be imported is a test case without a class, named like the module.
        module = test.get("classname") or test.get("name") or "unknown"
        counts = results.setdefault(module.removeprefix("tests.ops.test_"), Counts())
        kinds = {child.tag for child in test}
        if kinds & {"failure", "error"}:
            counts.failed += 1
        elif "skipped" in kinds:
            counts.skipped += 1
        else:
            counts.passed += 1
