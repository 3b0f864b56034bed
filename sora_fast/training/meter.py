"""What training steps cost: tokens and FLOPs a second, the share of the measured peak, waiting, memory, energy."""

import contextlib
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sora_fast.nvml import Nvml
from sora_fast.training.ceiling import measured_ceiling


@dataclass
class _Sums:
    """Since the last reading."""

    useful: int = 0
    flops: int = 0
    waited: float = 0.0


class Meter:
    """Adds up steps, and says at every reading what those since the last one were like.

    dtype: that the model's products are computed in. workers: devices like this one that share a step: the tokens are
        those of all, FLOPs, memory and watts this one's.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, workers: int = 1) -> None:
        self.workers = workers
        self.device, self.ceiling = device, measured_ceiling(device, dtype)
        self._nvml = Nvml(device)
        self._sums = _Sums()
        self._began, self._joules = time.perf_counter(), self._nvml.joules

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what a step waits for: the next batch."""
        began = time.perf_counter()
        yield
        self._sums.waited += time.perf_counter() - began

    def add(self, useful: int, flops: int) -> None:
        """Of a step: tokens that are no padding, of all workers, and this device's FLOPs."""
        self._sums.useful += useful
        self._sums.flops += flops

    def read(self) -> dict[str, float]:
        """tokens_per_s: useful ones. mfu, waiting: shares, of the measured peak and of the time.
        tflops: of the model, a second. memory_bytes: the most so far. watts, joules_per_1k_tokens: where the GPU says;
        the latter as if those of all workers took as much.
        """
        now, joules, sums = time.perf_counter(), self._nvml.joules, self._sums
        seconds = now - self._began
        found = {
            "tokens_per_s": sums.useful / seconds,
            "tflops": sums.flops / seconds / 1e12,
            "mfu": sums.flops / seconds / self.ceiling,
            "waiting": sums.waited / seconds,
            "memory_bytes": _memory(self.device),
        }
        if joules is not None and self._joules is not None and joules > self._joules:
            spent = joules - self._joules
            found |= {
                "watts": spent / seconds,
                "joules_per_1k_tokens": 1e3 * spent * self.workers / max(sums.useful, 1),
            }
        self._sums, self._began, self._joules = _Sums(), now, joules
        return found


def _memory(device: torch.device) -> int:
    """Bytes at the most: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
