import sys
from types import SimpleNamespace

import pytest
import torch

from sora_fast.nvml import Nvml


class _Refused(Exception):
    pass


def _refuse(*_: object) -> None:
    raise _Refused


def test_a_cpu_has_no_answers_and_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=_Refused))  # anything asked of it would raise
    nvml = Nvml(torch.device("cpu"))
    assert (nvml.is_there, nvml.joules, nvml.watts, nvml.ask("nvmlDeviceGetTemperature")) == (False, None, None, None)


def test_units_are_joules_and_watts_and_a_refusal_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(
        NVMLError=_Refused,
        NVML_CLOCK_SM=7,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 12_500,
        nvmlDeviceGetPowerUsage=_refuse,
        nvmlDeviceGetClockInfo=lambda handle, clock: (handle, clock),
    )
    monkeypatch.setattr("sora_fast.nvml._connect", lambda device: (library, "handle"))
    nvml = Nvml(torch.device("cuda"))
    assert (nvml.joules, nvml.watts) == (12.5, None)
    assert nvml.ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM") == ("handle", 7)
