import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks._checkout import ROOT
from benchmarks.timing import ReplayClock, Timing, device_clock, host_microseconds, time_variants

CPU = torch.device("cpu")


def test_timing_reads_the_work_and_not_the_noise() -> None:
    rounds = time_variants(
        {"long": lambda: time.sleep(0.02), "short": lambda: time.sleep(0.002)}, device=CPU, seconds=0.3
    )
    times = {name: Timing.of(samples) for name, samples in rounds.items()}
    assert 20 <= times["long"].low <= times["long"].median <= times["long"].high
    assert times["short"].median < times["long"].median / 2
    assert times["long"].samples == times["short"].samples >= 3


def test_variants_take_turns() -> None:
    calls: list[str] = []
    time_variants({name: lambda name=name: calls.append(name) for name in "abc"}, device=CPU, max_samples=20)
    assert "".join(calls[:6]) == "aabbcc", "a warm-up of each"
    rounds = ["".join(calls[start : start + 3]) for start in range(6, len(calls), 3)]
    assert len(rounds) == 20 and all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) == 6, "nobody always comes after the same one"


def test_freed_memory_costs_no_page_faults_again() -> None:
    code = """
import resource, torch
from benchmarks.timing import keep_freed_memory
keep_freed_memory()
torch.ones(64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1000, "64 MiB are 16,384 pages"


def test_out_of_time_still_gives_three_samples() -> None:
    assert len(time_variants({"a": lambda: None}, device=CPU, seconds=0.0)["a"]) == 3


def test_deciles() -> None:
    assert Timing.of([float(x) for x in range(10, -1, -1)]) == Timing(5.0, 1.0, 9.0, 11)


def test_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="variants"):
        time_variants({}, device=CPU)


class FakeGpu:
    """A queue that runs beside the host: in seconds, when the device will be done with what is queued. log: what was
    queued, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.log = 0.0, []
        for name in ("Event", "_sleep", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name), raising=False)
        flush = SimpleNamespace(max=lambda: self.queue("flush", 2.5e-4))
        monkeypatch.setattr(timing.torch, "zeros", lambda *_, **__: flush)

    def queue(self, what: str, seconds: float) -> None:
        self.log.append(what)
        self.done = max(self.done, time.perf_counter()) + seconds

    def work(self, *, host: float, device: float, launches: int = 1) -> Callable[[], None]:
        def run() -> None:
            for _ in range(launches):
                busy_until = time.perf_counter() + host / launches
                while time.perf_counter() < busy_until:
                    pass
                self.queue("work", device / launches)

        return run

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(moment=0.0)

        def record() -> None:
            self.log.append("event")
            event.moment = max(self.done, time.perf_counter())

        event.record, event.elapsed_time = record, lambda end: 1e3 * (end.moment - event.moment)
        return event

    def _sleep(self, cycles: int) -> None:
        self.queue("sleep", cycles / 2e9)

    def synchronize(self, device: object = None) -> None:
        time.sleep(max(0.0, self.done - time.perf_counter()))


def _median(work: Callable[[], None], **options: bool) -> float:
    rounds = time_variants({"x": work}, device=torch.device("cuda"), seconds=0.3, **options)
    return Timing.of(rounds["x"]).median


def test_the_device_sleeps_until_a_small_op_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 ms of launching, a third of a millisecond of work: only a sleep tells them apart."""
    gpu = FakeGpu(monkeypatch)
    small = gpu.work(host=4e-3, device=3e-4, launches=3)
    assert 0.29 < _median(small) < 1
    assert gpu.log[:7] == ["flush", "sleep", "event", "work", "work", "work", "event"]
    assert _median(small, asleep=False) > 2, "as a user waits for it"


def test_what_takes_the_device_long_is_timed_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    assert 4.9 < _median(gpu.work(host=1e-4, device=5e-3)) < 8


def test_it_never_sleeps_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    cycles: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append, raising=False)
    for seconds in (0.0, 1e-3, 60.0):
        timing.sleep(seconds)
    assert [cycle / 2e9 for cycle in cycles] == pytest.approx([2e-4, 1e-3, 5e-2])


def test_the_hosts_time_is_that_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    assert 1000 <= host_microseconds(gpu.work(host=1e-3, device=5e-3), torch.device("cuda")) < 3000


@pytest.mark.gpu
def test_events_time_the_device_and_not_the_launch() -> None:
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    times = time_variants({"one": lambda: a @ a, "three": lambda: a @ a @ a @ a}, device=device, seconds=0.5)
    assert 2 < Timing.of(times["three"]).median / Timing.of(times["one"]).median < 4


@pytest.mark.gpu
def test_device_clock_waits_for_the_device() -> None:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    a @ a
    start, host = device_clock(), time.perf_counter()
    for _ in range(20):
        a @ a
    host = time.perf_counter() - host
    seconds = device_clock() - start
    # 22 TFLOP: the host only queued them.
    assert seconds > 0.005 and seconds > 2 * host


def test_replayed_rounds_are_what_was_measured() -> None:
    clock = ReplayClock()
    clock.load([3.0, 1.0])
    durations = []
    for _ in range(2):
        clock.restart()
        start = clock()
        clock.tick()
        durations.append(clock() - start)
    assert durations == [3e-3, 1e-3]
