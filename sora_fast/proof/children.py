"""Starts the processes that judge, several at once, and outlives whatever happens in them."""

import json
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

from sora_fast.proof.tasks import Task


@dataclass(frozen=True)
class Limits:
    """Seconds that a child may take to start, that a plan may take, and that all may; children at once."""

    start: float = 120.0
    plan: float = 60.0
    total: float = 120.0
    workers: int = 1


@dataclass(frozen=True)
class Verdict:
    """What became of a plan: "passed", "failed", or "unjudged", which says nothing about the kernel."""

    plan: str
    verdict: str
    reason: str = ""


def judged(
    tasks: Sequence[Task], limits: Limits, environment: Mapping[str, str], progress: Callable[[], None]
) -> Iterator[Verdict]:
    """A verdict on every plan of every task, in any order, before `limits.total` seconds have passed.

    A child that crashes, hangs or fails is replaced by one that goes on with the next plan. All children are gone when
    this ends, however it ends. progress: called after every plan.
    """
    deadline = time.monotonic() + limits.total
    waiting, running = deque(task for task in tasks if task.names), []
    with selectors.DefaultSelector() as selector:
        try:
            while (waiting or running) and time.monotonic() < deadline:
                while waiting and len(running) < limits.workers:
                    running.append(_Child(waiting.popleft(), environment, limits))
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
                yield from (Verdict(name, "unjudged", "no time was left") for name in task.names)
        finally:
            for child in running:
                child.close()


class _Child:
    """One process, and what it has said. left: what it has not come to; ended: it says nothing more."""

    def __init__(self, task: Task, environment: Mapping[str, str], limits: Limits) -> None:
        self.left, self.ended = task, False
        self._limits, self._since = limits, time.monotonic()
        self._ready, self._settled, self._plan, self._buffer = False, False, "", b""
        self._said: list[Verdict] = []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-m", "sora_fast.proof.child", task.written()]
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
        *lines, self._buffer = (self._buffer + received).split(b"\n")
        for line in lines:
            with suppress(ValueError):  # noise
                self._hear(json.loads(line))
        if not received:
            self.ended = True
            code = self._exit_code()
            self._stopped(f"{_said_by(code)}{self._last_words()}", memory=code == -signal.SIGKILL)

    def _hear(self, line: dict[str, str]) -> None:
        self._since = time.monotonic()
        if "ends" in line:
            self._settle(line["ends"], line["verdict"], line["reason"])
        self._ready = True
        self._plan = line.get("begins", "")

    def _settle(self, plan: str, verdict: str, reason: str) -> None:
        self.left = replace(self.left, names=tuple(name for name in self.left.names if name != plan))
        self._said.append(Verdict(plan, verdict, reason))
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
        late = time.monotonic() - self._since
        if not self.ended and late > (self._limits.plan if self._ready else self._limits.start):
            self.ended = True
            self._kill()
            self._stopped(f"hung: it was stopped after {late:.0f} s")
        said, self._said = self._said, []
        return said

    def _last_words(self) -> str:
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:300]}" if lines else ""

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # A process that the driver holds cannot be ended; it is left behind.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    def close(self) -> None:
        """End the process if it still runs."""
        self._kill()
        self.output.close()
        self._errors.close()


def _said_by(code: int | None) -> str:
    if code is None:
        return "crashed: it ended, but its process stays"
    if code >= 0:
        return f"crashed: exit code {code}"
    with suppress(ValueError):
        return f"crashed: {signal.Signals(-code).name}"
    return f"crashed: signal {-code}"


def child_environment(*, interpreted: bool) -> dict[str, str]:
    """Of a child: kernels are compiled, or interpreted; the package is found where this one is."""
    root = str(Path(__file__).resolve().parents[2])
    places = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "TRITON_INTERPRET": str(int(interpreted))}
    environment.pop("SORA_FAST_BACKEND", None)
    # Several at once would each take all cores.
    return {**environment, "OMP_NUM_THREADS": "1"}
