"""Batches made by processes: the same bits, whatever happens to the processes."""

import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_fast.models.codecs import IdentityCodec
from sora_fast.models.text import ByteTextEncoder
from sora_fast.training.data import plan, pool
from sora_fast.training.data.batches import Batch, BatchConfig, Batches
from sora_fast.training.data.sources import Sample, UnusableSample


@dataclass
class Clips:
    """Clips of many shapes, each its own number; `broken` cannot be read, and `deadly` kills whoever reads it.

    deaths: a folder; a killer in it kills once, by the signal `by`. slow: seconds that it takes to read one.
    """

    size: int = 60
    broken: int | None = None
    deadly: int | None = None
    deaths: Path | None = None
    slow: float = 0.0
    by: int = signal.SIGSEGV

    def __len__(self) -> int:
        return self.size

    def shape(self, index: int) -> tuple[int, int, int, int]:
        random = np.random.default_rng(index)
        return (1, int(random.integers(1, 5)), *(int(side) for side in random.integers(5, 20, size=2)))

    def __getitem__(self, index: int) -> Sample:
        if index == self.broken:
            raise UnusableSample("no decoder knows it")
        time.sleep(self.slow)
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.deaths is not None and (self.deaths / str(index)).exists():
            (self.deaths / str(index)).unlink()
            os.kill(os.getpid(), self.by)
        return Sample(torch.full(self.shape(index), float(index)), f"clip {index}")

    def name(self, index: int) -> str:
        return f"clip-{index}.mp4"


def _batches(source: Clips, *, workers: int = 0) -> Batches:
    config = BatchConfig(capacity=256, max_segments=16, look_ahead=24, text_capacity=200)
    options = {"patch_size": (1, 4, 4), "codec": IdentityCodec(1), "text": ByteTextEncoder(8, layers=1)}
    return Batches(source, config, **options, seed=3, workers=workers)


def _take(batches: Batches, count: int) -> list[Batch]:
    items = iter(batches)
    taken = list(itertools.islice(items, count))
    items.close()
    return taken


def _same(one: Batch, other: Batch) -> bool:
    pairs = [(one.latents.flat, other.latents.flat), (one.layout.coords, other.layout.coords)]
    pairs += [(one.latents.shapes, other.latents.shapes), (one.prompts.ids, other.prompts.ids)]
    return all(torch.equal(*pair) for pair in pairs) and one.useful == other.useful and one.resume == other.resume


def _numbers(batch: Batch) -> set[int]:
    return {int(video.flatten()[0]) for video in batch.latents.to_list()}


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bits_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    source = Clips(broken=7)
    alone, made = _take(_batches(source), 16), _take(_batches(source, workers=workers), 16)
    assert all(map(_same, alone, made))
    assert "lost" in alone[-1].resume
    resumed = _batches(source, workers=workers)
    resumed.load_state_dict(json.loads(json.dumps(alone[5].resume)))
    assert all(map(_same, alone[6:], _take(resumed, 4)))


def test_what_kills_a_worker_is_named_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    batches = _batches(Clips(deadly=11), workers=2)
    made = _take(batches, 20)
    reason = "a data worker that was reading it was killed (SIGKILL)"
    assert caplog.messages == [f"left out from now on, 1 so far: clip-11.mp4: {reason}"]
    assert made[-1].resume["lost"] == {"clip-11.mp4": reason}
    assert made[-1].skipped == 1
    assert set().union(*map(_numbers, made)) == set(range(60)) - {11}
    # Planned as if it was there: all other samples lie where they would.
    whole = _take(_batches(Clips()), 20)
    assert [_numbers(batch) for batch in made] == [_numbers(batch) - {11} for batch in whole]
    resumed = _batches(Clips(deadly=11), workers=0)  # would be killed itself, if it tried
    resumed.load_state_dict(json.loads(json.dumps(made[14].resume)))
    assert all(map(_same, made[15:], _take(resumed, 5)))


def test_a_scheduler_that_ends_a_worker_loses_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "11").touch()
    made = _take(_batches(Clips(deaths=tmp_path, by=signal.SIGTERM), workers=2), 20)
    assert "a data worker was killed (SIGTERM), by no fault of a file" in caplog.text
    assert "lost" not in made[-1].resume and all(map(_same, _take(_batches(Clips()), 20), made))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_lost_is_soon_not_planned_with_any_more(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LAG", 6)
    source = Clips(size=8, broken=3)
    alone, made = _take(_batches(source), 24), _take(_batches(source, workers=workers), 24)
    assert all(map(_same, alone, made))
    found = next(number for number, batch in enumerate(made) if "lost" in batch.resume)
    assert {batch.resume["left_out"]["clip-3.mp4"] for batch in made[found:]} == {found + 1 + 6}
    full = [batch.useful for batch in _take(_batches(Clips(size=8)), 24)]
    assert sum(batch.useful for batch in made[:6]) < 0.97 * sum(full[:6])
    assert sum(batch.useful for batch in made[-8:]) > 0.97 * sum(full[-8:])
    resumed = _batches(source, workers=workers)
    resumed.load_state_dict(json.loads(json.dumps(made[4].resume)))
    assert all(map(_same, made[5:], _take(resumed, 19)))


def test_a_death_by_chance_is_the_same_from_then_on(tmp_path: Path) -> None:
    """Of packs on their way none keeps the sample, though it could be read there."""
    (tmp_path / "5").touch()
    made = _take(_batches(Clips(deaths=tmp_path), workers=3), 30)
    first = next(number for number, batch in enumerate(made) if "lost" in batch.resume)
    assert not any(5 in _numbers(batch) for batch in made[first:])
    assert any(5 in _numbers(batch) for batch in _take(_batches(Clips()), 30)[first:])


def test_a_killed_worker_that_was_reading_nothing_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    batches = _batches(Clips(), workers=2)
    items = iter(batches)
    taken = [next(items)]
    pool = items.gi_frame.f_locals["pool"]
    idle = 0
    while idle < 10:  # all that they have is made, and nothing comes unasked
        time.sleep(0.05)
        idle = idle + 1 if set(pool._reading) == {-1} else 0
    os.kill(pool._workers[0].process.pid, signal.SIGKILL)
    pool._workers[0].process.join()
    taken += itertools.islice(items, 8)
    items.close()
    assert all(map(_same, taken, _take(_batches(Clips()), 9)))
    assert caplog.messages == ["a data worker was killed (SIGKILL), by no fault of a file; another one takes its place"]


def test_workers_that_end_all_at_once_are_one_event(caplog: pytest.LogCaptureFixture) -> None:
    """As a scheduler ends them; not three deaths, one after the other, for which there must be a reason."""
    batches = _batches(Clips(), workers=3)
    items = iter(batches)
    taken = [next(items)]
    for worker in items.gi_frame.f_locals["pool"]._workers:
        os.kill(worker.process.pid, signal.SIGTERM)
    taken += itertools.islice(items, 8)
    items.close()
    assert all(map(_same, taken, _take(_batches(Clips()), 9))) and not batches.lost
    assert len(caplog.messages) == 3


@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no server of forks here"
)
def test_of_a_dead_server_no_file_is_guilty(caplog: pytest.LogCaptureFixture) -> None:
    """What its workers died of, or whether, is not known then."""
    batches = _batches(Clips(slow=0.02), workers=2)
    items = iter(batches)
    taken = [next(items)]
    reading = items.gi_frame.f_locals["pool"]._reading
    while -1 in set(reading):
        time.sleep(0.001)
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    taken += itertools.islice(items, 8)
    items.close()
    assert all(map(_same, taken, _take(_batches(Clips()), 9))) and not batches.lost
    assert caplog.text.count("ended with exit code 255, by no fault of a file") == 2


def test_errors_of_a_worker_are_told_where_it_was_started() -> None:
    source = Clips(deaths="no path")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"a data worker failed:[\s\S]*TypeError: unsupported operand"):
        _take(_batches(source, workers=1), 1)


def test_nothing_left_to_train_on() -> None:
    with pytest.raises(ValueError, match=r"nothing is left to train on; the last was clip-0.mp4: a data worker"):
        _take(_batches(Clips(size=1, deadly=0), workers=1), 5)


def test_no_process_outlives_the_batches() -> None:
    threads = threading.active_count()
    _take(_batches(Clips(), workers=2), 3)
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("batches-")]
    assert threading.active_count() == threads


def test_a_server_that_refuses_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [ConnectionRefusedError(111, "Connection refused")] * 3
    monkeypatch.setattr(pool, "_PAUSE", 0.001)

    class Process:
        started = False

        def start(self) -> None:
            if refusals:
                raise refusals.pop()
            self.started = True

    pool._start(process := Process())
    assert process.started
