"""Time variants of the same work fairly: interleaved, from a cold cache, by CUDA events on a GPU."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Work = Callable[[], object]

# Read before every sample. Far above the L2 of any GPU (H200: 60 MB), so that each sample starts cold; read
# and not written, so that no dirty line goes back to memory on the sample's time. It keeps an H200 busy for
# about 0.25 ms, in which the host queues the sample's launches: events then time the device and not Python.
_FLUSH_BYTES = 1 << 30


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median and the first and ninth decile of `samples` calls."""

    median: float
    low: float
    high: float
    samples: int

    @staticmethod
    def of(samples: list[float]) -> "Timing":
        ordered = sorted(samples)
        last = len(ordered) - 1
        return Timing(
            median=statistics.median(ordered),
            low=ordered[round(0.1 * last)],
            high=ordered[round(0.9 * last)],
            samples=len(ordered),
        )


def time_variants(
    variants: Mapping[str, Work],
    *,
    device: torch.device,
    seconds: float = 1.0,
    max_samples: int = 200,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Time every variant in turn, round after round, so that a drift of the clocks meets them all alike.

    After `warmup` calls each, rounds go on until `seconds` have passed (all variants together), but at
    least 3 times, or until `max_samples` rounds are done.
    """
    if not variants:
        raise ValueError("time_variants: variants is empty; give at least one callable")
    sample = _CudaSampler(device) if device.type == "cuda" else _sample_on_host
    for work in variants.values():
        for _ in range(warmup):
            sample(work)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    for done in range(max_samples):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, work in variants.items():
            samples[name].append(sample(work))
    return {name: Timing.of(times) for name, times in samples.items()}


def _sample_on_host(work: Work) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


class _CudaSampler:
    def __init__(self, device: torch.device) -> None:
        self.flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self.device = device

    def __call__(self, work: Work) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.max()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end)
