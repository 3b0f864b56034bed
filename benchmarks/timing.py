"""Time variants of the same work fairly: interleaved, from a cold cache, by CUDA events on a GPU."""

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[], object]

# Read before every sample. Far above the L2 of any GPU (H200: 60 MB), so that each sample starts cold; read
# and not written, so that no dirty line goes back to memory on the sample's time.
_FLUSH_BYTES = 1 << 30
# Then the device sleeps for twice as long as the host last took to queue the work, so that events time the device and
# not Python: an op's launch may take the host longer than its kernel runs. At least, at most, in seconds; beyond that
# the host is what is timed.
_LEAST_SLEEP, _MOST_SLEEP = 2e-4, 5e-2
# Of an H200 at its highest. At a lower clock it sleeps longer.
_CYCLES_A_SECOND = 2e9


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median and the first and ninth decile of `samples` calls."""

    median: float
    low: float
    high: float
    samples: int

    @staticmethod
    def of(samples: Sequence[float]) -> "Timing":
        ordered = sorted(samples)
        last = len(ordered) - 1
        return Timing(
            median=statistics.median(ordered),
            low=ordered[round(0.1 * last)],
            high=ordered[round(0.9 * last)],
            samples=len(ordered),
        )


def keep_freed_memory() -> None:
    """From now on the host's allocator keeps what is freed, as jemalloc and tcmalloc do, where it is glibc's.

    Left alone it gives large blocks back, and the next op pays for its output page by page: 13 ms in place of 4 for one
    that writes 25 MB, or nothing, as luck has it. (A whole training step gains 3%.)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def time_variants(
    variants: Mapping[str, Work],
    *,
    device: torch.device,
    seconds: float = 1.0,
    max_samples: int = 200,
    warmup: int = 2,
    asleep: bool = True,
) -> dict[str, list[float]]:
    """Milliseconds of every round of every variant, which take turns, so that a drift of the clocks meets them alike.

    In another order every round: what a variant leaves in the caches and the allocator hastens or delays the next one.
    After `warmup` calls each, rounds go on until `seconds` have passed (all variants together), but at
    least 3 times, or until `max_samples` rounds are done. asleep: on a GPU, time what the device does, all of it queued
    before; False: from the first launch to the end, waiting for the host included.
    """
    if not variants:
        raise ValueError("time_variants: variants is empty; give at least one callable")
    sample = _CudaSampler(device, asleep) if device.type == "cuda" else _sample_on_host
    for work in variants.values():
        for _ in range(warmup):
            sample(work)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    turns, shuffle = list(variants.items()), random.Random(0).shuffle
    for done in range(max_samples):
        if done >= 3 and time.perf_counter() > end:
            break
        shuffle(turns)
        for name, work in turns:
            samples[name].append(sample(work))
    return samples


def _sample_on_host(work: Work) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


class _CudaSampler:
    def __init__(self, device: torch.device, asleep: bool) -> None:
        self.flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self.device, self.asleep = device, asleep
        self._queued: dict[int, float] = {}  # seconds that the host last took, by work

    def __call__(self, work: Work) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.max()
        if self.asleep:
            sleep(2 * self._queued.get(id(work), 0.0))
        start.record()
        began = time.perf_counter()
        work()
        self._queued[id(work)] = time.perf_counter() - began
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end)


def sleep(seconds: float) -> None:
    """Let the GPU wait for about so long before what is queued next."""
    torch.cuda._sleep(int(min(max(seconds, _LEAST_SLEEP), _MOST_SLEEP) * _CYCLES_A_SECOND))


def host_microseconds(work: Work, device: torch.device, calls: int = 30) -> float:
    """What a call takes of the host, the median of some. The GPU's queue is empty before, and it sleeps: nothing waits
    for it, unless `work` itself does."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize(device)
        sleep(_LEAST_SLEEP)
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return 1e6 * statistics.median(times)


class _Moment:
    """A place in the device's queue of work; the difference of two is in seconds, and waits for the later one."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "_Moment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def device_clock() -> Any:
    """A timer for pytest-benchmark that times the device's work, where the host's clock would time its launches.

    It leaves the cache as it is, and variants come one after the other: what is compared belongs into a contest
    (benchmarks/contests.py).
    """
    return _Moment()


class ReplayClock:
    """A timer for pytest-benchmark that stands still, but for the rounds that it is given: `tick` takes the next.

    So rounds that were measured in turn with those of other variants become the rounds of one benchmark.
    """

    __name__ = "interleaved rounds"

    def __init__(self) -> None:
        self.now = 0.0
        self._rounds = iter(())

    def __call__(self) -> float:
        return self.now

    def load(self, milliseconds: Sequence[float]) -> None:
        """The rounds to come. Each starts at 0, so that none loses digits."""
        self._rounds = iter(milliseconds)

    def restart(self) -> None:
        self.now = 0.0

    def tick(self) -> None:
        self.now += next(self._rounds) / 1e3
