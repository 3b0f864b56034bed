"""What the driver says of a GPU (NVML), where nvidia-ml-py is installed: energy, power, clocks, temperature."""

from collections.abc import Callable
from typing import Any

import torch


class Nvml:
    """One GPU's answers. Any may be None: without the library, or where the driver does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.library, self._handle = _connect(device)

    @property
    def is_there(self) -> bool:
        return self.library is not None

    @property
    def joules(self) -> float | None:
        """Of the whole device since the driver was loaded; renewed every few tens of milliseconds."""
        return _thousandth(self.ask("nvmlDeviceGetTotalEnergyConsumption"))

    @property
    def watts(self) -> float | None:
        return _thousandth(self.ask("nvmlDeviceGetPowerUsage"))

    def ask(self, question: str, *details: Any) -> Any:
        """The answer of NVML's function of that name; details may be names of its constants."""
        if self.library is None:
            return None
        details = tuple(getattr(self.library, detail) if isinstance(detail, str) else detail for detail in details)
        try:
            ask: Callable[..., Any] = getattr(self.library, question)
            return ask(self._handle, *details)
        except self.library.NVMLError:
            return None


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1e3


def _connect(device: torch.device) -> tuple[Any, Any]:
    """The library and the handle of the very GPU that `device` is, whatever CUDA_VISIBLE_DEVICES hides."""
    if device.type != "cuda":
        return None, None
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
