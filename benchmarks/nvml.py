"""What a GPU says of itself while it works: memory, joules, clocks, and why it holds them back."""

import math
from collections.abc import Callable
from typing import Any

import torch

# The driver renews its count of energy every few tens of milliseconds.
_SECONDS = 0.25


class Gauge:
    """Readings of one GPU. Without nvidia-ml-py, or where the driver does not answer, the memory alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._nvml, self._handle = _connect(device)

    def read(self, work: Callable[[], object], milliseconds: float) -> dict[str, Any]:
        """Of `work`, which takes so long, repeated for a moment: numbers and text, what is not known left out.

        peak_bytes: memory above what was there before; joules: of one call, what the idle device takes included.
        """
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        notes: dict[str, Any] = {"peak_bytes": torch.cuda.max_memory_allocated(self.device) - before}
        if self._nvml is None:
            return notes
        calls = max(1, math.ceil(1e3 * _SECONDS / milliseconds))
        start = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        for _ in range(calls):
            work()
        notes |= self.state()
        torch.cuda.synchronize(self.device)
        end = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        if start is not None and end is not None and end > start:
            notes["joules"] = (end - start) / 1e3 / calls
        return notes

    def state(self) -> dict[str, Any]:
        """Clocks in MHz, temperature in °C, watts, and what holds the clocks back, at this moment."""
        nvml = self._nvml
        if nvml is None:
            return {}
        watts = self._ask(nvml.nvmlDeviceGetPowerUsage)
        found = {
            "sm_mhz": self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            "memory_mhz": self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            "celsius": self._ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            "watts": None if watts is None else watts / 1e3,
            "throttled_by": self._throttled_by(),
        }
        return {name: value for name, value in found.items() if value is not None}

    def _throttled_by(self) -> str | None:
        bits = self._ask(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        return None if bits is None else ", ".join(throttle_names(self._nvml, bits)) or "nothing"

    def _ask(self, question: Callable[..., Any], *details: Any) -> Any:
        try:
            return question(self._handle, *details)
        except self._nvml.NVMLError:
            return None


def throttle_names(nvml: Any, bits: int) -> list[str]:
    """The names of the bits, as NVML has them: SwPowerCap and the like."""
    prefix = "nvmlClocksThrottleReason"
    return [
        name.removeprefix(prefix)
        for name, value in sorted(vars(nvml).items())
        if name.startswith(prefix) and isinstance(value, int) and value and value & (value - 1) == 0 and bits & value
    ]


def _connect(device: torch.device) -> tuple[Any, Any]:
    """The module and the handle of the very GPU that `device` is, whatever CUDA_VISIBLE_DEVICES hides."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(name)
    except pynvml.NVMLError:
        return None, None
