import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sora_fast.diffusion.paths import DDPM
from sora_fast.models import SoraDiTConfig
from sora_fast.packing import SigmoidDrop
from sora_fast.training import checkpoint, replay, trainer
from sora_fast.training.data.batch import Batch
from sora_fast.training.data.batches import BatchConfig, Batches
from sora_fast.training.data.sources import Sample, UnusableSample
from sora_fast.training.run import CHECKPOINTS, CONFIG, LOG, RunConfig, TextConfig, TrainConfig, read_run
from sora_fast.training.runlog import read_log
from sora_fast.training.trainer import Trainer
from sora_fast.training.watchers import Watcher
from tests.recording import FakeRecorder


class Gradients:
    """Clips of many shapes that brighten to one side; raises SIGINT, as Ctrl-C does, when a sample is asked for."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at = interrupt_at

    def __getitem__(self, index: int) -> Sample:
        if index == self.interrupt_at:
            self.interrupt_at = None
            signal.raise_signal(signal.SIGINT)
        random = np.random.default_rng(index)
        frames = int(random.integers(2, 5)) if index % 3 else 1
        height, width = (int(side) for side in random.integers(8, 17, size=2))
        ramp = torch.linspace(-1, 1, width).expand(1, frames, height, width)
        left = bool(random.integers(2))
        return Sample(ramp.flip(-1) if left else ramp, "left" if left else "right")


def tiny(**options: object) -> RunConfig:
    batch = BatchConfig(capacity=128, max_segments=8, text_capacity=64, look_ahead=12)
    return RunConfig(
        model=SoraDiTConfig(dim=32, depth=1, heads=2, in_channels=1, patch_size=(1, 4, 4), text_dim=16, pooled_dim=16),
        train=TrainConfig(
            **{"steps": 12, "batch": batch, "compile": None, "save_every": 4, "warmup": 2, **options}  # type: ignore[arg-type]
        ),
        text=TextConfig(dim=16, layers=1),
    )


def _losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["norm"]) for row in read_log(folder / LOG)]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.latest(folder / CHECKPOINTS)
    assert saved is not None
    return {f"{group}.{name}": t for group, named in saved.tensors.items() for name, t in named.items()}


def _assert_same_run(one: Path, other: Path) -> None:
    assert _losses(one) == _losses(other)
    first, second = _weights(one), _weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert Trainer(tiny(), Gradients(), folder).fit(progress=False)
    return folder


def test_learns(tmp_path: Path) -> None:
    Trainer(tiny(steps=80, lr=3e-3), Gradients(), tmp_path / "run").fit(progress=False)
    losses = [loss for _, loss, _ in _losses(tmp_path / "run")]
    assert len(losses) == 80
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:10])


def test_run_folder(whole: Path) -> None:
    assert read_run(whole) == tiny()
    rows = read_log(whole / LOG)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(0 <= row["padding"] < 0.5 and row["useful"] > 64 for row in rows)
    assert rows[0]["lr"] < rows[2]["lr"] > rows[-1]["lr"]
    assert sorted(p.name for p in (whole / CHECKPOINTS).iterdir()) == ["step-00000008", "step-00000012"]


def test_interrupted_then_resumed_to_the_bit(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)  # a shell lets background jobs ignore it
    stopped = Trainer(tiny(), Gradients(interrupt_at=45), folder)
    assert not stopped.fit(progress=False)
    assert 0 < stopped.step < 12
    assert "saving" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    resumed = Trainer(tiny(), Gradients(), folder, resume=True)
    assert resumed.step == stopped.step
    assert resumed.fit(progress=False)
    _assert_same_run(whole, folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_stopped_and_gone_on_with_to_the_bit(whole: Path, tmp_path: Path, workers: int) -> None:
    """By the same trainer: what it had made ahead when it was stopped is made again."""

    class _Stops(Watcher):
        def stepped(self, step: int, weights: Mapping[str, torch.Tensor]) -> None:
            if step == 4:
                signal.raise_signal(signal.SIGINT)

    trainer = Trainer(tiny(workers=workers), Gradients(), tmp_path / "run", watchers=[_Stops()])
    assert not trainer.fit(progress=False)
    assert trainer.step == 4
    assert trainer.fit(progress=False)
    _assert_same_run(whole, tmp_path / "run")


def test_a_batch_without_prompts_is_no_other_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a compiled run: its texts have no tokens then."""
    finished, made = Batches._finished, []

    def some(self: Batches, pack: Any) -> Batch:
        made.append(finished(self, pack))
        return replace(made[-1], prompts=None) if len(made) % 3 == 0 else made[-1]

    monkeypatch.setattr(Batches, "_finished", some)
    torch._dynamo.reset()
    for scope in ("model", None):
        made.clear()
        options = {"compile": scope and "aot_eager", "compile_scope": scope or "blocks"}
        with torch._dynamo.config.patch(error_on_recompile=True):
            Trainer(tiny(steps=6, **options), Gradients(), tmp_path / str(scope)).fit(progress=False)
    compiled, eager = (_losses(tmp_path / str(scope)) for scope in ("model", None))
    assert [loss for _, loss, _ in compiled] == pytest.approx([loss for _, loss, _ in eager], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_as_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    """With a stand-in for CUDA's capture; the rates are float32 then, so it is the same to rounding."""
    monkeypatch.setattr(trainer, "CudaRecorder", lambda device: FakeRecorder())
    for graph in (True, False):
        Trainer(tiny(graph=graph, optimizer=optimizer), Gradients(), tmp_path / str(graph)).fit(progress=False)
    one, other = (_losses(tmp_path / name) for name in ("True", "False"))
    assert [loss for _, loss, _ in one] == pytest.approx([loss for _, loss, _ in other], rel=1e-3)
    assert [norm for *_, norm in one] == pytest.approx([norm for *_, norm in other], rel=1e-2)


def test_a_graph_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a CUDA graph needs a GPU, and the device is cpu"):
        Trainer(tiny(graph=True), Gradients(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_workers_change_no_bit(whole: Path, tmp_path: Path) -> None:
    assert Trainer(tiny(workers=2), Gradients(), tmp_path / "run").fit(progress=False)
    _assert_same_run(whole, tmp_path / "run")


def test_resumed_with_dropped_tokens_to_the_bit(tmp_path: Path) -> None:
    drop = SigmoidDrop(12, high=0.7, low=0.1)
    config = tiny(batch=replace(tiny().train.batch, drop=drop, max_segments=16))
    assert Trainer(config, Gradients(), tmp_path / "whole").fit(progress=False)
    stopped = Trainer(config, Gradients(interrupt_at=60), tmp_path / "run")
    assert not stopped.fit(progress=False)
    assert 0 < stopped.step < 12
    assert Trainer(read_run(tmp_path / "run"), Gradients(), tmp_path / "run", resume=True).fit(progress=False)
    _assert_same_run(tmp_path / "whole", tmp_path / "run")


class Unusable(Gradients):
    """None of the first samples can be used: whole packs are empty."""

    def __getitem__(self, index: int) -> Sample:
        if index in self.lost:
            raise UnusableSample("nothing knows it")
        return super().__getitem__(index)

    lost = frozenset()

    def shape(self, index: int) -> tuple[int, ...]:
        return tuple(super().__getitem__(index).video.shape)


def test_a_pack_of_which_nothing_can_be_used_changes_nothing(tmp_path: Path) -> None:
    source = Unusable()
    source.lost = frozenset(range(10_000))
    trainer = Trainer(tiny(steps=2), source, tmp_path / "run")
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    assert trainer.fit(progress=False)
    rows = read_log(tmp_path / "run" / LOG)
    assert [row["useful"] for row in rows] == [0, 0]
    assert all(row["loss"] == row["norm"] == 0 and row["skipped"] > 0 for row in rows)
    assert all(torch.allclose(p, before[name], atol=1e-3) for name, p in trainer.parameters.items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_from_an_older_checkpoint(tmp_path: Path, optimizer: str) -> None:
    """What was logged after the checkpoint, and half a line, are written anew."""
    config = tiny(optimizer=optimizer)
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        Trainer(config, Gradients(), folder).fit(progress=False)
    newest = max((other / CHECKPOINTS).iterdir())
    os.truncate(newest / "model.safetensors", 100)
    with (other / LOG).open("a") as file:
        file.write('{"step": 13, "lo')
    resumed = Trainer(config, Gradients(), other, resume=True)
    assert resumed.step == 8
    assert resumed.fit(progress=False)
    _assert_same_run(one, other)


def test_nothing_but_damaged_checkpoints_is_no_fresh_start(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Trainer(tiny(steps=2), Gradients(), folder).fit(progress=False)
    (folder / CHECKPOINTS / "step-00000002" / "state.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        Trainer(tiny(steps=2), Gradients(), folder, resume=True)
    assert len(read_log(folder / LOG)) == 2


_TRAIN = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from sora_fast import files
from tests.training.test_trainer import Gradients, Trainer, tiny

flush, written = files.flush, []

def flush_or_die(path):
    if path.match(sys.argv[2]) and path.name in written:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path.name)
    flush(path)

files.flush = flush_or_die
Trainer(tiny(), Gradients(), Path(sys.argv[1])).fit(progress=False)
"""


@pytest.mark.parametrize(
    ("moment", "step"), [(".partial-8/model.safetensors", 4), (".partial-8/state.json", 4), ("checkpoints", 8)]
)
def test_killed_while_saving_then_resumed_to_the_bit(whole: Path, tmp_path: Path, moment: str, step: int) -> None:
    """Killed in the middle of the second save: at its first file, at its last one, and after its renaming."""
    folder = tmp_path / "run"
    process = subprocess.run([sys.executable, "-c", _TRAIN.format(path=sys.path), str(folder), moment], check=False)
    assert process.returncode == -signal.SIGKILL
    assert any((folder / CHECKPOINTS).glob(".partial-*")) == moment.startswith(".partial")
    resumed = Trainer(tiny(), Gradients(), folder, resume=True)
    assert resumed.step == step
    assert resumed.fit(progress=False)
    _assert_same_run(whole, folder)


def test_limited_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()  # a clock that goes on by a second whenever it is looked at: at least once a step
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    assert Trainer(tiny(steps=None, minutes=1.0, warmup=0), Gradients(), tmp_path / "run").fit(progress=False)
    rows = read_log(tmp_path / "run" / LOG)
    assert 30 < len(rows) <= 60
    assert rows[-1]["lr"] < 0.05 * rows[0]["lr"]


def test_compiles_for_no_batch_anew_and_learns_the_same(tmp_path: Path) -> None:
    """How often the blocks are captured does not depend on the backend; this one spares the C++ compiler."""
    config = tiny(steps=6)
    config = replace(config, model=replace(config.model, depth=3))
    Trainer(config, Gradients(), tmp_path / "eager").fit(progress=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = replace(config, train=replace(config.train, compile="aot_eager"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        Trainer(compiled, Gradients(), tmp_path / "compiled").fit(progress=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one graph for all blocks"
    eager, fast = _losses(tmp_path / "eager"), _losses(tmp_path / "compiled")
    np.testing.assert_allclose(np.array(eager), np.array(fast), rtol=1e-4)


def test_ddpm_and_no_text(tmp_path: Path) -> None:
    config = tiny(steps=3)
    path = DDPM(learned_variance=True)
    model = replace(config.model, text_dim=None, pooled_dim=None, discrete_time=True, learned_sigma=True)
    config = replace(config, model=model, text=None, path=path)
    Trainer(config, Gradients(), tmp_path / "run").fit(progress=False)
    assert read_run(tmp_path / "run") == config
    assert len(_losses(tmp_path / "run")) == 3


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Trainer(tiny(steps=2), Gradients(), tmp_path / "run").fit(progress=False)
    assert torch.equal(torch.rand(3), expected)


class Broken(Gradients):
    """Whose samples from `first` to `last` are not finite."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.broken = range(first, last + 1)

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return replace(sample, video=sample.video * (float("inf") if index in self.broken else 1))


def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(tmp_path: Path) -> None:
    """And a run that has one is resumed to the bit."""
    config = tiny(steps=14, log_every=2)
    one = Trainer(config, Broken(40, 40), tmp_path / "one")
    assert one.fit(progress=False)
    rows = read_log(tmp_path / "one" / LOG)
    bad = [row["step"] for row in rows if not np.isfinite(row["loss"] + row["norm"])]
    assert len(rows) == 14 and len(bad) == one.skipped_steps == 1
    assert "1 steps skipped as not finite" in one._log.flush(0.0)
    assert all(value.isfinite().all() for value in _weights(tmp_path / "one").values())
    adam = next(iter(one.optimizers[0].state.values()))
    assert adam["step"] == 13, "the optimizer knows nothing of it"


@pytest.mark.parametrize("after", [0, 30])
def test_diverged(tmp_path: Path, after: int, caplog: pytest.LogCaptureFixture) -> None:
    """Three in a row are enough; the first is kept, and its replay tells that it was the data."""
    folder = tmp_path / "run"
    trainer = Trainer(tiny(steps=100, save_every=1), Broken(after, 10**9), folder)
    with pytest.raises(FloatingPointError, match="not finite in 3 steps in a row") as error:
        trainer.fit(progress=False)
    first = error.value.step
    assert (first == 1) == (after == 0)
    assert f"{first} to {first + 2};" in str(error.value) and f"the packs of step {first} are kept in" in caplog.text
    assert [row["step"] for row in read_log(folder / LOG)][-1] >= first + 1
    (finding,) = replay.replay(folder)
    assert finding.step == first and finding.where.startswith("the data: sample ")
    saved = checkpoint.latest(folder / CHECKPOINTS)
    assert all(value.isfinite().all() for named in saved.tensors.values() for value in named.values())


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files cannot grow past a limit while steps 5 to 8 are taken: the checkpoint of step 8 fails, and the log too."""
    folder, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    there: list[list[str]] = []

    class _Full(Trainer):
        def _record(self, *args: Any) -> None:
            if self.step in (5, 9):
                size = (folder / LOG).stat().st_size + 100 if self.step == 5 else limits[0]
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            super()._record(*args)
            if self.step == 8:
                there.append([path.name for path in (folder / CHECKPOINTS).iterdir()])

    try:
        assert _Full(tiny(log_every=1), Gradients(), folder).fit(progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert there == [["step-00000004"]]
    assert "the checkpoint of step 8 could not be written" in caplog.text
    assert caplog.text.count("log.jsonl cannot be written") == 1
    assert checkpoint.latest(folder / CHECKPOINTS).step == 12
    assert [row["step"] for row in read_log(folder / LOG)] == list(range(1, 13))


def test_the_last_checkpoint_of_a_run_must_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = Trainer(tiny(steps=2), Gradients(), tmp_path / "run")
    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(progress=False)


@pytest.mark.parametrize("changed", [{"accumulate": 3}, {"recompute": "selective"}, {"precision": "bfloat16"}])
def test_options_of_the_step_resume_to_the_bit(tmp_path: Path, changed: dict[str, Any]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    Trainer(tiny(decay="constant", **changed), Gradients(), one).fit(progress=False)
    Trainer(tiny(decay="constant", steps=5, **changed), Gradients(), other).fit(progress=False)
    Trainer(tiny(decay="constant", **changed), Gradients(), other, resume=True).fit(progress=False)
    _assert_same_run(one, other)


def test_old_configurations_mean_what_they_meant(tmp_path: Path) -> None:
    Trainer(tiny(steps=1), Gradients(), tmp_path / "run").fit(progress=False)
    file = tmp_path / "run" / CONFIG
    values = json.loads(file.read_text())
    for name in ("compile_scope", "recompute", "accumulate", "nonfinite_limit"):
        del values["train"][name]
    file.write_text(json.dumps(values))
    assert read_run(tmp_path / "run") == tiny(steps=1)
    assert (tiny().train.compile_scope, tiny().train.recompute, tiny().train.accumulate) == ("blocks", None, 1)


def test_resumed_with_another_learning_rate_for_more_steps(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    changed = tiny(steps=16, lr=1e-4)
    assert Trainer(changed, Gradients(), folder, resume=True).fit(progress=False)
    assert read_run(folder) == changed
    rows = read_log(folder / LOG)
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert max(row["lr"] for row in rows[12:]) <= 1e-4 < rows[2]["lr"]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (tiny(seed=1), "seed"),
        (tiny(batch=BatchConfig(capacity=256), optimizer="muon"), "batch, optimizer"),
        (replace(tiny(), text=TextConfig(dim=16, layers=2)), "text"),
    ],
)
def test_resumed_with_what_does_not_fit(whole: Path, config: RunConfig, named: str) -> None:
    before = (whole / CONFIG).read_text()
    with pytest.raises(ValueError, match=f"^{named}: changed since"):
        Trainer(config, Gradients(), whole, resume=True)
    assert (whole / CONFIG).read_text() == before


def test_refuses_a_folder_with_a_run(whole: Path) -> None:
    with pytest.raises(ValueError, match="already holds a run"):
        Trainer(tiny(), Gradients(), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_as_one_graph_on_a_gpu(tmp_path: Path, optimizer: str) -> None:
    for graph in (True, False):
        config = tiny(graph=graph, optimizer=optimizer)
        Trainer(config, Gradients(), tmp_path / str(graph), device="cuda").fit(progress=False)
    one, other = (_losses(tmp_path / name) for name in ("True", "False"))
    assert [loss for _, loss, _ in one] == pytest.approx([loss for _, loss, _ in other], rel=1e-2)
