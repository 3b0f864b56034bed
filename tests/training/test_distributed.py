"""Two workers in processes of their own, a few small steps each."""

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sora_fast.training.distributed import World, workers
from sora_fast.training.muon import _shared, orthogonal
from sora_fast.training.run import LOG, RunConfig
from sora_fast.training.trainer import Trainer, read_log
from tests.training.test_trainer import Gradients, _assert_same_run, tiny


def _exchange(folder: Path) -> None:
    world = World.current()
    tensors = [torch.full((2, 3), float(world.rank)), torch.tensor(10.0 * world.rank)]
    world.average(tensors)
    totals = world.total(world.rank, 1.5)
    gathered = world.gather(torch.full((2, 1), world.rank))
    torch.save((tensors, totals, gathered, torch.get_num_threads()), folder / f"{world.rank}.pt")


def _fail() -> None:
    raise ArithmeticError("a worker's own")


def _config(steps: int) -> RunConfig:
    # A rate that does not depend on where the run ends: it ends twice. Two blocks: equal matrices to share out.
    config = tiny(steps=steps, decay="constant", optimizer="muon")
    return replace(config, model=replace(config.model, depth=2))


def _train(folder: Path, steps: int, resume: bool = False) -> bool:
    trainer = Trainer(_config(steps), Gradients(), folder / "run", resume=resume)
    finished = trainer.fit(progress=False)
    weights = torch.cat([p.detach().flatten() for p in trainer.parameters.values()])
    torch.save((trainer.step, weights), folder / f"weights{trainer.world.rank}.pt")
    return finished


def _train_on_two(folder: Path, steps: int, resume: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    with workers(2, _train, folder, steps, resume):
        assert _train(folder, steps, resume)


def test_a_single_worker_exchanges_nothing() -> None:
    with workers(1, _fail) as world:
        assert world == World(0, 1) == World.current()
        tensor = torch.ones(3)
        world.average([tensor])
        assert world.total(2, 3) == [2, 3]
        assert world.gather(tensor).tolist() == tensor.tolist() == [1, 1, 1]


def test_two_workers_exchange(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with workers(2, _exchange, tmp_path) as world:
        assert world == World(0, 2)
        _exchange(tmp_path)
    assert torch.get_num_threads() == threads
    for rank in range(2):
        (matrix, scalar), totals, gathered, share = torch.load(tmp_path / f"{rank}.pt")
        assert matrix.tolist() == [[0.5] * 3] * 2
        assert scalar.item() == 5
        assert totals == [1, 3]
        assert gathered.tolist() == [[0], [0], [1], [1]]
        assert share == max(1, threads // 2)
    assert World.current() == World()


def test_a_failing_worker_takes_the_others_along() -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError), workers(2, _fail) as world:
        world.total(1)
    assert time.monotonic() - began < 600, "they did not wait out the half hour that gloo would"
    assert World.current() == World()


def _orthogonal(folder: Path) -> None:
    world, differences = World.current(), []
    for shape in ((4, 8, 20), (4, 20, 8), (3, 8, 20)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        differences.append(_shared(world, matrices) - orthogonal(matrices))
    torch.save(differences, folder / f"{world.rank}.pt")


def test_workers_share_the_work_of_muon(tmp_path: Path) -> None:
    with workers(2, _orthogonal, tmp_path):
        _orthogonal(tmp_path)
    for rank in range(2):
        for difference in torch.load(tmp_path / f"{rank}.pt"):
            torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-6)


def test_without_workers_is_an_error() -> None:
    with pytest.raises(ValueError, match="size: 0"), workers(0, _fail):
        pass


def test_two_workers_train_one_model(tmp_path: Path) -> None:
    whole, parts, alone = tmp_path / "whole", tmp_path / "parts", tmp_path / "alone"
    _train_on_two(whole, steps=4)
    (steps, one), (_, other) = (torch.load(whole / f"weights{rank}.pt") for rank in range(2))
    assert steps == 4
    assert torch.equal(one, other)

    _train_on_two(parts, steps=2)
    _train_on_two(parts, steps=4, resume=True)
    _assert_same_run(whole / "run", parts / "run")

    # Every step goes through twice the packs: those of steps 1 and 2 of a single worker, then 3 and 4.
    alone.mkdir()
    _train(alone, steps=8)
    useful = [row["useful"] for row in read_log(alone / "run" / LOG)]
    assert [row["useful"] for row in read_log(whole / "run" / LOG)] == torch.tensor(useful).view(4, 2).sum(1).tolist()


def test_the_step_is_along_the_mean_of_the_gradients(tmp_path: Path) -> None:
    losses, gradients = [], []
    for rank in range(2):
        trainer = Trainer(_config(1), Gradients(), tmp_path / f"alone{rank}")
        trainer.world = trainer.batches.world = World(rank, 2)
        batch = next(iter(trainer.batches))
        loss = trainer._loss(batch.latents, batch.layout, batch.prompts, *trainer._draw(batch))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters.values()]))
    assert losses[0] != losses[1]
    _train_on_two(tmp_path, steps=1)
    (row,) = read_log(tmp_path / "run" / LOG)
    assert row["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert row["norm"] == pytest.approx(torch.stack(gradients).mean(0).norm().item(), rel=1e-5)


def test_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a b é"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with workers(2, _exchange, tmp_path):
        _exchange(tmp_path)


def test_a_worker_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    """In a script without the usual guard the workers run the script again, and fail."""
    script = tmp_path / "script.py"
    script.write_text(
        "from sora_fast.training.distributed import workers\nwith workers(2, print):\n    print('never here')\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "never here" not in result.stdout
    assert "RuntimeError: workers: 1 of 1 did not start; exit codes [1]" in result.stderr


def test_not_within_another_group(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="already"), workers(2, _fail):
            pass
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
