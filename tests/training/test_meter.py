"""Readings over a clock, a peak and an energy counter that the test sets."""

from types import SimpleNamespace

import pytest
import torch

from sora_fast.training import meter
from sora_fast.training.meter import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(seconds=100.0, joules=None)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock.seconds)
    monkeypatch.setattr(meter, "measured_ceiling", lambda device, dtype: 1e12)
    monkeypatch.setattr(meter, "Nvml", lambda device: clock)
    return clock


def test_a_reading_is_of_the_steps_since_the_last_one(clock: SimpleNamespace) -> None:
    meter = Meter(torch.device("cpu"), torch.float32)
    for useful in (300, 500):
        with meter.waiting():
            clock.seconds += 0.5
        clock.seconds += 1.5
        meter.add(useful, flops=6 * 10**11)
    found = meter.read()
    assert found["tokens_per_s"] == 800 / 4
    assert found["tflops"] == pytest.approx(2 * 0.6 / 4) and found["mfu"] == pytest.approx(0.3)
    assert found["waiting"] == 0.25 and found["memory_bytes"] > 1 << 20
    assert not {"watts", "joules_per_1k_tokens"} & found.keys()
    clock.seconds += 1
    assert meter.read()["tokens_per_s"] == 0


def test_energy_is_that_of_the_device_between_two_readings(clock: SimpleNamespace) -> None:
    clock.joules = 1000.0
    meter = Meter(torch.device("cpu"), torch.float32, workers=2)
    clock.seconds, clock.joules = clock.seconds + 2, 2400.0
    meter.add(7000, flops=6)
    found = meter.read()
    assert (found["watts"], found["joules_per_1k_tokens"]) == (700, 400)
