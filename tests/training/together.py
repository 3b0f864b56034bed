"""What tests run as several workers: `launch(2, [this file, the name of a function, a folder])`."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from sora_fast.training.distributed import World, joined
from sora_fast.training.muon import _shared, orthogonal
from sora_fast.training.run import RunConfig
from sora_fast.training.trainer import Trainer
from tests.training.test_trainer import Gradients, tiny


class Measured(Gradients):
    """Tells the shape of a sample, so that nobody need make it for that."""

    def shape(self, index: int) -> tuple[int, ...]:
        return tuple(super().__getitem__(index).video.shape)


class Counted(Gradients):
    """Writes down which samples were made, and by whom."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def __getitem__(self, index: int) -> object:
        with self.file.open("a") as file:
            file.write(f"{index}\n")
        return super().__getitem__(index)


def config(steps: int, **options: object) -> RunConfig:
    # A rate that does not depend on where the run ends: it ends twice. Two blocks: equal matrices to share out.
    made = tiny(steps=steps, decay="constant", optimizer="muon", **options)
    return replace(made, model=replace(made.model, depth=2))


def train(folder: Path, steps: int, source: object, *, resume: bool = False) -> None:
    trainer = Trainer(config(steps), source, folder / "run", resume=resume)
    assert trainer.fit(progress=False)
    weights = torch.cat([p.detach().flatten() for p in trainer.parameters.values()])
    torch.save((trainer.step, weights), folder / f"weights{trainer.world.rank}.pt")


# Run by name.


def exchange(folder: Path) -> None:
    world = World.current()
    tensors = [torch.full((2, 3), float(world.rank)), torch.tensor(10.0 * world.rank)]
    world.mean(tensors, torch.tensor(1 + 2 * world.rank))
    nothing = torch.ones(2)
    world.mean([nothing], torch.tensor(0))
    results = {
        "mean": [tensor.tolist() for tensor in tensors],
        "nothing": nothing.tolist(),
        "total": world.total(world.rank, 1.5),
        "gather": world.gather(torch.full((2, 1), world.rank)).tolist(),
        "joint": world.joint([item * item for item in world.shared_out(range(5))]),
        "apart": world.apart().total(world.rank + 1),
        "threads": torch.get_num_threads(),
        "muon": [],
    }
    for shape in ((4, 8, 20), (4, 20, 8), (3, 8, 20)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        results["muon"].append((_shared(world, matrices) - orthogonal(matrices)).abs().max().item())
    torch.save(results, folder / f"{world.rank}.pt")


def fail(folder: Path) -> None:
    if World.current().rank == 1:
        sys.exit(3)
    World.current().total(1)  # of which the other never takes part


def runs(folder: Path) -> None:
    """A run in one go, the same in two parts, and one whose samples have to be made to be measured."""
    rank = World.current().rank
    for name in ("whole", "parts", "decoded"):
        (folder / name).mkdir(exist_ok=True)
    train(folder / "whole", 4, Measured())
    train(folder / "parts", 2, Measured())
    train(folder / "parts", 4, Measured(), resume=True)
    train(folder / "decoded", 4, Counted(folder / "decoded" / f"made{rank}.txt"))


def gloo_threads() -> list[str]:
    names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    torch.manual_seed(0)
    with joined():
        assert gloo_threads()
        {"exchange": exchange, "fail": fail, "runs": runs}[sys.argv[1]](Path(sys.argv[2]))
    # One that is left may want the interpreter while it ends, which aborts the process.
    assert not gloo_threads()
