from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.nvml import Gauge, throttle_names


class _Refused(Exception):
    pass


def _refuse(*_: Any) -> None:
    raise _Refused


NVML = SimpleNamespace(
    NVMLError=_Refused,
    NVML_CLOCK_SM=1,
    NVML_CLOCK_MEM=2,
    NVML_TEMPERATURE_GPU=0,
    nvmlClocksThrottleReasonNone=0,
    nvmlClocksThrottleReasonGpuIdle=1,
    nvmlClocksThrottleReasonSwPowerCap=4,
    nvmlClocksThrottleReasonAll=5,
    nvmlDeviceGetClockInfo=lambda handle, clock: 1000 * clock,
    nvmlDeviceGetPowerUsage=lambda handle: 650_500,
    nvmlDeviceGetTemperature=_refuse,
    nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 4,
)


def test_what_the_driver_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sora_fast.nvml._connect", lambda device: (NVML, "handle"))
    assert Gauge(torch.device("cuda")).state() == {
        "sm_mhz": 1000,
        "memory_mhz": 2000,
        "watts": 650.5,
        "throttled_by": "SwPowerCap",
    }


def test_throttle_reasons_are_single_bits() -> None:
    assert throttle_names(NVML, 5) == ["GpuIdle", "SwPowerCap"] and throttle_names(NVML, 0) == []


@pytest.mark.gpu
def test_readings_of_real_work() -> None:
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    notes = Gauge(device).read(lambda: a @ a, 1.0)
    assert notes["peak_bytes"] >= a.nbytes and notes.get("joules", 1) > 0
