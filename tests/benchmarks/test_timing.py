import time

import pytest
import torch

from benchmarks.timing import Timing, time_variants

CPU = torch.device("cpu")


def test_timing_reads_the_work_and_not_the_noise() -> None:
    times = time_variants(
        {"long": lambda: time.sleep(0.02), "short": lambda: time.sleep(0.002)}, device=CPU, seconds=0.3
    )
    assert 20 <= times["long"].low <= times["long"].median <= times["long"].high
    assert times["short"].median < times["long"].median / 2
    assert times["long"].samples == times["short"].samples >= 3


def test_variants_take_turns() -> None:
    calls: list[str] = []
    time_variants({name: lambda name=name: calls.append(name) for name in "ab"}, device=CPU, max_samples=4)
    assert "".join(calls) == "aabb" + "ab" * 4, "a warm-up of each, then rounds"


def test_out_of_time_still_gives_three_samples() -> None:
    assert time_variants({"a": lambda: None}, device=CPU, seconds=0.0)["a"].samples == 3


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
    assert 2 < times["three"].median / times["one"].median < 4
