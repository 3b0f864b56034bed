import subprocess
import sys
import time

import pytest
import torch

from benchmarks._checkout import ROOT
from benchmarks.timing import ReplayClock, Timing, device_clock, time_variants

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
