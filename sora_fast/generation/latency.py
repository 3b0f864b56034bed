"""Where the time of a call of the engine went."""

import statistics
import time
from dataclasses import dataclass, field


@dataclass
class Latency:
    """Seconds on the host's clock, which on a GPU runs ahead of the device until the videos are read.

    steps: of each. network: in the network, of all steps. prepared, decoded: before the first step, after the last.
    tokens: that the network saw, over all calls. calls: of the network; skipped: those cut short by the step cache.
    replayed: steps that were launched as one graph, all of which counts as the network's.
    """

    prepared: float = 0.0
    steps: list[float] = field(default_factory=list)
    network: float = 0.0
    decoded: float = 0.0
    tokens: int = 0
    calls: int = 0
    skipped: int = 0
    replayed: int = 0

    @property
    def outside(self) -> float:
        """Share of the steps' time that was not the network's."""
        total = sum(self.steps)
        return 1 - self.network / total if total else 0.0

    def __str__(self) -> str:
        first, *others = self.steps or [0.0]
        others = others or [first]
        skipped = f", {self.skipped} of {self.calls} cut short by the cache" if self.skipped else ""
        share = f"{self.outside:.0%} outside the network{skipped}"
        if self.replayed:
            share = f"{self.replayed} of {len(self.steps)} launched as one graph each"
        return (
            f"prepared in {duration(self.prepared)}, first step {duration(first)}, "
            f"then {duration(statistics.median(others))} a step ({share}), "
            f"decoded in {duration(self.decoded)}"
        )


class Clock:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """And start anew."""
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed


def duration(seconds: float) -> str:
    """In milliseconds below ten seconds."""
    return f"{1e3 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
