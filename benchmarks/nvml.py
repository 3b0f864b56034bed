"""What a GPU says of itself while it works: memory, joules, clocks, and why it holds them back."""

import math
from collections.abc import Callable
from typing import Any

import torch

from sora_fast.nvml import Nvml

# The driver renews its count of energy every few tens of milliseconds.
_SECONDS = 0.25


class Gauge:
    """Readings of one GPU. Without nvidia-ml-py, or where the driver does not answer, the memory alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._nvml = Nvml(device)

    def read(self, work: Callable[[], object], milliseconds: float) -> dict[str, Any]:
        """Of `work`, which takes so long, repeated for a moment: numbers and text, what is not known left out.

        peak_bytes: memory above what was there before; joules: of one call, what the idle device takes included.
        """
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        notes: dict[str, Any] = {"peak_bytes": torch.cuda.max_memory_allocated(self.device) - before}
        if not self._nvml.is_there:
            return notes
        calls = max(1, math.ceil(1e3 * _SECONDS / milliseconds))
        start = self._nvml.joules
        for _ in range(calls):
            work()
        notes |= self.state()
        torch.cuda.synchronize(self.device)
        end = self._nvml.joules
        if start is not None and end is not None and end > start:
            notes["joules"] = (end - start) / calls
        return notes

    def state(self) -> dict[str, Any]:
        """Clocks in MHz, temperature in °C, watts, and what holds the clocks back, at this moment."""
        found = {
            "sm_mhz": self._nvml.ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            "memory_mhz": self._nvml.ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
            "celsius": self._nvml.ask("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
            "watts": self._nvml.watts,
            "throttled_by": self._throttled_by(),
        }
        return {name: value for name, value in found.items() if value is not None}

    def _throttled_by(self) -> str | None:
        bits = self._nvml.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return None if bits is None else ", ".join(throttle_names(self._nvml.library, bits)) or "nothing"


def throttle_names(nvml: Any, bits: int) -> list[str]:
    """The names of the bits, as NVML has them: SwPowerCap and the like."""
    prefix = "nvmlClocksThrottleReason"
    return [
        name.removeprefix(prefix)
        for name, value in sorted(vars(nvml).items())
        if name.startswith(prefix) and isinstance(value, int) and value and value & (value - 1) == 0 and bits & value
    ]
