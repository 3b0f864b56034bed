"""compute-sanitizer's memcheck over every small case, where the tool is on the PATH: it comes with the CUDA toolkit."""

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.jobs import Job

_NAME = "sanitizer"


def sanitizer_job(folder: Path, ops: Sequence[str]) -> Job | None:
    """None where there is no such tool."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return None
    # Errors of the CUDA API that PyTorch provokes and handles are none of ours.
    options = ["--tool", "memcheck", "--report-api-errors", "no"]
    walk = [sys.executable, "-m", "benchmarks.walk", "--ops", *ops]
    # PyTorch's allocator puts tensors side by side into one block, within which memcheck sees no edge.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Job(_NAME, [tool, *options, *walk], folder / f"{_NAME}.log", environment)


def read_sanitizer(job: Job | None, codes: Mapping[str, int]) -> dict[str, Any]:
    """{"errors": how many, None if that is not known; "note": what happened}."""
    if job is None:
        return {"errors": None, "note": "compute-sanitizer is not on the PATH"}
    if job.name not in codes:
        return {"errors": None, "note": "out of time"}
    summary = re.search(r"ERROR SUMMARY: (\d+) error", job.log.read_text(errors="replace"))
    if summary is None:
        return {"errors": None, "note": f"it ended with {codes[job.name]} and without a summary: see {job.log.name}"}
    return {"errors": int(summary[1]), "note": f"memcheck over small cases, exit code {codes[job.name]}"}
