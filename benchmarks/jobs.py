"""Several processes at once, none of which outlives its time."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks._checkout import ROOT


@dataclass(frozen=True)
class Job:
    """A command, run at the root of the checkout. log: where it prints. environment: beside that of this process."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def run_jobs(jobs: Sequence[Job], *, workers: int, deadline: float) -> dict[str, int]:
    """Exit codes of those that ended before `deadline` (of time.monotonic); the first in the list start first.

    The others are killed with all that they started; so is everything if this is interrupted.
    """
    waiting, codes = deque(jobs), {}
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                running[job.name] = _start(job)
            time.sleep(0.05)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                codes[name] = running.pop(name).returncode
    finally:
        for process in running.values():
            _kill(process)
    return codes


def _start(job: Job) -> subprocess.Popen[bytes]:
    with job.log.open("wb") as log:
        # A session of its own, so that all that it starts can be ended with it.
        options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
        return subprocess.Popen(job.command, cwd=ROOT, env={**os.environ, **job.environment}, **options)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
