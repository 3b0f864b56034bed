"""Run the tests marked `gpu` in a process of their own, and count what they say op by op."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks._checkout import ROOT


@dataclass
class Counts:
    """Tests of one op, or of one other file."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0


def run_gpu_tests(folder: Path, seconds: float) -> dict[str, Counts]:
    """Run `pytest -m gpu`, stopped after `seconds`; writes tests.log and tests.xml into `folder`."""
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)  # of an earlier call, whose passes are not this one's
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", f"--junitxml={report}"]
    if torch.cuda.is_available() and find_spec("xdist"):
        # Most of the time goes into compiling kernels, which is work for the host's cores.
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    with (folder / "tests.log").open("w") as log:
        try:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=seconds)
        except subprocess.TimeoutExpired:
            log.write(f"\nstopped after {seconds:.0f} s\n")
            return {"the run, stopped by its time limit": Counts(failed=1)}
    return read_report(report)


def read_report(report: Path) -> dict[str, Counts]:
    """Counts of a JUnit report: those of tests/ops/test_<op>.py under the op's name, others under their module's."""
    results: dict[str, Counts] = {}
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
    return results
