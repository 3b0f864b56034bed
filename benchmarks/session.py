"""What the phases of one call of the GPU suite share, and how they have work done in other processes."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.outbox import Outbox
from benchmarks.suite import Suite
from benchmarks.tasks import Task
from sora_fast.proof.children import Limits, Verdict, child_environment, judged

# Seconds: to import PyTorch and Triton; without a sign of life; that an item may take. Walking through it on a CPU
# proves that all is called as it should be, however busy the CPU is.
_START, _SILENCE, _ITEM, _PATIENCE_OF_DRY = 90.0, 30.0, 45.0, 10.0
_ROUNDS_OF_DRY = 0.01


class Stopped(BaseException):
    """Somebody wants this to end, or it cannot go on. No error: what handles those must not swallow it."""


@dataclass
class Session:
    """One call. phases: in their order. ops, wholes: that it looks at (benchmarks/grid.py). dry: small, on a CPU too.
    cache: a folder of compiled kernels that were made elsewhere (benchmarks/travelling.py). device: once it is known.
    environment: of the processes, beside that of this one."""

    outbox: Outbox
    phases: tuple[str, ...]
    ops: tuple[str, ...]
    wholes: tuple[str, ...]
    dry: bool
    commit: str | None = None
    cache: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    device: str = "any"
    suite: Suite | None = None
    published: float = 0.0

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def workers(self) -> int:
        """Processes at once where nothing is timed: compiling takes the time, and the suite itself a core."""
        return max(2, min(14, (os.cpu_count() or 1) - 2)) if self.on_gpu else os.cpu_count() or 1

    def save(self, *, at_least_every: float = 0.0) -> None:
        """Bring everything out, unless that was done just now."""
        if self.suite is not None and time.monotonic() - self.published >= at_least_every:
            self.suite.save()
            self.outbox.publish()
            self.published = time.monotonic()

    def verdicts(
        self, phase: str, tasks: Sequence[Task], until: float, *, workers: int = 1, item: float = _ITEM
    ) -> Iterator[Verdict]:
        """What became of every item of all tasks; what is known by then is brought out after each. item: seconds that
        one may take."""
        patience = _PATIENCE_OF_DRY if self.dry else 1.0
        limits = Limits(
            start=_START * patience,
            plan=item * patience,
            total=until - time.monotonic(),
            silence=_SILENCE * patience,
            workers=workers,
        )
        # One at a time is timed: nothing else should run beside it.
        threads = {"TORCHINDUCTOR_COMPILE_THREADS": "1" if workers > 1 else "4"}
        environment = child_environment(interpreted=self.dry and not self.on_gpu) | self.environment | threads
        for verdict in judged(tasks, limits, environment, logs=self.outbox.logs / phase):
            yield verdict
            self.save(at_least_every=2.0)

    def task(self, step: str, names: Sequence[str], until: float, **options: object) -> Task:
        """Of a module of benchmarks/steps."""
        return Task(f"benchmarks.steps.{step}", tuple(names), self.device, options, until - time.monotonic() + 60)

    def timed(self, step: str, names: Sequence[str], until: float, *, seconds: float) -> Task:
        """seconds: of rounds; 0: nothing is timed, which fills the compilers' caches."""
        seconds = min(seconds, _ROUNDS_OF_DRY) if self.dry else seconds
        return self.task(step, names, until, seconds=seconds, dry=self.dry)
