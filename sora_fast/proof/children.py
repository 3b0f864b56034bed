"""Starts the processes that judge, several at once, and outlives whatever happens in them.

Whoever has work that may crash or hang can have it done here: benchmarks/gpu_suite.py measures so.
"""

import itertools
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

NO_TIME = "no time was left"


class Task(Protocol):
    """What a process is to do, a frozen dataclass: `python -m program written()` works through `names` in that order,
    and tells of each as sora_fast/proof/child.py does. title: of its log.
    """

    names: tuple[str, ...]
    program: str
    title: str

    def written(self) -> str: ...


@dataclass(frozen=True)
class Limits:
    """Seconds that a child may take to start, that a plan may take, that all may, and between two signs of life;
    children at once."""

    start: float = 120.0
    plan: float = 60.0
    total: float = 120.0
    silence: float = math.inf
    workers: int = 1


@dataclass(frozen=True)
class Verdict:
    """What became of a plan: "passed", "failed", or "unjudged", which says nothing about the kernel. found: what the
    child had to tell besides."""

    plan: str
    verdict: str
    reason: str = ""
    found: Any = None

    @property
    def lost_its_process(self) -> bool:
        """Whether it crashed or hung, and so had no say itself."""
        return self.reason.startswith((_CRASHED, _HUNG))


_CRASHED, _HUNG = "crashed: ", "hung: "


def judged(
    tasks: Sequence[Task],
    limits: Limits,
    environment: Mapping[str, str],
    progress: Callable[[], None] = lambda: None,
    *,
    logs: Path | None = None,
) -> Iterator[Verdict]:
    """A verdict on every plan of every task, in any order, before `limits.total` seconds have passed.

    A child that crashes, hangs or fails is replaced by one that goes on with the next plan. All children are gone when
    this ends, however it ends. progress: called after every plan. logs: a folder that gets a file a child, of what it
    prints; None: nobody reads it but for the last line before a crash.
    """
    numbers = itertools.count()
    deadline = time.monotonic() + limits.total
    waiting, running = deque(task for task in tasks if task.names), []
    with selectors.DefaultSelector() as selector:
        try:
            while (waiting or running) and time.monotonic() < deadline:
                while waiting and len(running) < limits.workers:
                    errors = _log(logs, f"{next(numbers):02}-{waiting[0].title}.log")
                    running.append(_Child(waiting.popleft(), environment, limits, errors))
                    selector.register(running[-1].output, selectors.EVENT_READ, running[-1])
                for key, _ in selector.select(timeout=0.1):
                    key.data.read()
                for child in list(running):
                    for verdict in child.verdicts():
                        progress()
                        yield verdict
                    if child.ended:
                        selector.unregister(child.output)
                        running.remove(child)
                        child.close()
                        if child.left.names:
                            waiting.append(child.left)
            for task in [*(child.left for child in running), *waiting]:
                yield from (Verdict(name, "unjudged", NO_TIME) for name in task.names)
        finally:
            for child in running:
                child.kill()
            for child in running:
                child.close()


def _log(folder: Path | None, name: str) -> IO[bytes]:
    if folder is None:
        return tempfile.TemporaryFile()
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / name).open("w+b")


class _Child:
    """One process, and what it has said. left: what it has not come to; ended: it says nothing more."""

    def __init__(self, task: Task, environment: Mapping[str, str], limits: Limits, errors: IO[bytes]) -> None:
        self.left, self.ended = task, False
        self._limits, self._since, self._heard = limits, time.monotonic(), time.monotonic()
        self._ready, self._settled, self._plan, self._place, self._buffer = False, False, "", "", b""
        self._said: list[Verdict] = []
        self._errors = errors
        command = [sys.executable, "-m", task.program, task.written()]
        # A session of its own: all that it starts ends with it, and Ctrl-C is for the parent.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=dict(environment),
            start_new_session=True,
        )
        self.output = self._process.stdout

    def read(self) -> None:
        """Take in what is there to read; does not wait."""
        received = os.read(self.output.fileno(), 1 << 16)
        self._heard = time.monotonic()
        *lines, self._buffer = (self._buffer + received).split(b"\n")
        for line in lines:
            with suppress(ValueError):  # noise
                heard = json.loads(line)
                if isinstance(heard, dict):
                    self._hear(heard)
        if not received:
            self.ended = True
            code = self._exit_code()
            self._stopped(f"{_said_by(code)}{self._last_words()}", memory=code == -signal.SIGKILL)

    def _hear(self, line: dict[str, Any]) -> None:
        if "beats" in line:
            self._place = str(line["beats"])
            return
        if {"ends", "verdict", "reason"} <= line.keys() and line["ends"] in self.left.names:
            self._settle(line["ends"], line["verdict"], line["reason"], line.get("found"))
        elif "begins" not in line and "ready" not in line:
            return  # noise
        self._since = time.monotonic()
        self._ready = True
        self._plan = line.get("begins", "")

    def _settle(self, plan: str, verdict: str, reason: str, found: Any = None) -> None:
        self.left = replace(self.left, names=tuple(name for name in self.left.names if name != plan))
        self._said.append(Verdict(plan, verdict, reason, found))
        self._settled = True

    def _exit_code(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(5)
        return None

    def _stopped(self, how: str, *, memory: bool = False) -> None:
        """The process is over, and this was not its plan: blame the plan that it was in, if it was in one."""
        if self._plan:
            self._settle(self._plan, "unjudged" if memory else "failed", how)
        elif not self._settled:  # another process would come no further
            for name in self.left.names:
                self._settle(name, "unjudged", f"its process did not start: {how}")

    def verdicts(self) -> list[Verdict]:
        """Those that are new; a process that has taken too long is ended first."""
        if not self.ended and (late := self._late()):
            self.ended = True
            self.kill()
            self._stopped(f"{_HUNG}it was stopped after {late}{f', at {self._place}' if self._place else ''}")
        said, self._said = self._said, []
        return said

    def _late(self) -> str:
        """How late it is, if it is too late."""
        now = time.monotonic()
        if now - self._since > (self._limits.plan if self._ready else self._limits.start):
            return f"{now - self._since:.0f} s"
        return f"{now - self._heard:.0f} s of silence" if now - self._heard > self._limits.silence else ""

    def _last_words(self) -> str:
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:300]}" if lines else ""

    def kill(self) -> None:
        """Without waiting for it to be gone."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process if it still runs."""
        self.kill()
        # A process that the driver holds cannot be ended; it is left behind.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self.output.close()
        self._errors.close()


def _said_by(code: int | None) -> str:
    if code is None:
        return f"{_CRASHED}it ended, but its process stays"
    if code >= 0:
        return f"{_CRASHED}exit code {code}"
    with suppress(ValueError):
        return f"{_CRASHED}{signal.Signals(-code).name}"
    return f"{_CRASHED}signal {-code}"


def child_environment(*, interpreted: bool) -> dict[str, str]:
    """Of a child: kernels are compiled, or interpreted; the package is found where this one is."""
    root = str(Path(__file__).resolve().parents[2])
    places = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "TRITON_INTERPRET": str(int(interpreted))}
    environment.pop("SORA_FAST_BACKEND", None)
    # Several at once would each take all cores.
    return {**environment, "OMP_NUM_THREADS": "1"}
