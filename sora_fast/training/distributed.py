"""Data-parallel training: workers that take the same steps on packs of their own, and add up their gradients.

Workers are processes that a launcher has started, torchrun or one like it; `joined` makes a group of them, and `launch`
is torchrun for a program that starts itself. Rank 0 keeps the run's folder, and is the one that the user sees.
"""

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Which of how many workers this process is. Every worker must call every method, in the same order.

    group: that exchanges; None: all workers' own. A thread beside the main one needs one of its own, see `apart`.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @staticmethod
    def current() -> "World":
        """Of torch.distributed, if it has been set up; else the only worker."""
        if dist.is_available() and dist.is_initialized():
            return World(dist.get_rank(), dist.get_world_size())
        return World()

    def apart(self) -> "World":
        """The same workers with exchanges of their own, of what lies on the CPU."""
        return self if self.size == 1 else World(self.rank, self.size, dist.new_group(backend="gloo"))

    def mean(self, tensors: Sequence[Tensor], weight: Tensor) -> None:
        """Replace each tensor by its mean over the workers, where a worker's counts `weight` [] times: the same bits on
        all of them, zeros if all weights are 0. One exchange for all."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors] + [weight.reshape(1).to(tensors[0].dtype)])
        flat[:-1] *= flat[-1]
        dist.all_reduce(flat, group=self.group)
        flat = flat[:-1] / flat[-1].clamp(min=1)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])

    def gather(self, tensor: Tensor) -> Tensor:
        """What the workers have, each the same shape [B, …], one after the other: [size · B, …]."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.group)
        return torch.cat(parts)

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over the workers. The numbers live on the host: no accelerator is waited for."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        dist.all_reduce(sums, group=self.group)
        return sums.tolist()

    def shared_out(self, items: Sequence[Any]) -> Sequence[Any]:
        """The items that fall to this worker, every `size`-th one; `joint` takes what became of them."""
        return items[self.rank :: self.size]

    def joint(self, mine: Sequence[Any]) -> list[Any]:
        """From what became of each worker's share, all items in their order. Picklable values, through the host."""
        if self.size == 1:
            return list(mine)
        shares: list[Any] = [None] * self.size
        dist.all_gather_object(shares, list(mine), group=self.group)
        whole: list[Any] = [None] * sum(map(len, shares))
        for rank, share in enumerate(shares):
            whole[rank :: self.size] = share
        return whole


def launched() -> bool:
    """Whether a launcher has started this process as one of several workers."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def local_rank() -> int:
    """Which of the workers on its machine this process is; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_device(name: str | None) -> str:
    """The name of the device that this process computes on, as --device asks for it; of a GPU each worker has its own.

    None: a GPU if there is one. ValueError if there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launched():
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # PyTorch knows names of devices it was not built for
        raise ValueError(f"--device {name}: it must be cpu, cuda, or cuda with a number, like cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: there is no usable GPU here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
    return name


@contextlib.contextmanager
def joined(device: torch.device | str = "cpu") -> Iterator[World]:
    """Inside, this process is one of the workers that a launcher has started; without a launcher, the only one.

    device: what this worker computes on, "cpu" or "cuda:…": tensors are exchanged by gloo or by NCCL. A group that is
        there already is used as it is, and stays.
    """
    if dist.is_initialized() or not launched():
        yield World.current()
        return
    # Its functions hold, as a default, the group that is there when they are first imported, which an optimizer does. A
    # group that is held keeps its threads when it is destroyed, and these abort the process while the interpreter ends.
    import torch.distributed.nn.functional

    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World.current()
    finally:
        dist.destroy_process_group()


def launch(size: int, arguments: Sequence[str]) -> int:
    """Run `python arguments…` as `size` workers on this machine's CPU, which share its cores out evenly; the exit code.

    What torchrun does. The workers write to this process's output; Ctrl-C is passed on to them, and half a minute later
    they are stopped. If one fails, the others are stopped too.
    """
    if size < 1:
        raise ValueError(f"size: {size}; there must be at least one worker")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    # Small matrices gain little from a second thread; a worker of its own they fill.
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // size))}
    # That Ctrl-C is passed on is no news.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    with _environment(threads):
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            return error.get_first_failure()[1].exitcode
        except SignalException as error:
            return 128 + (error.sigval or signal.SIGINT)
    return 0


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """With these; afterwards as it was, whatever the launcher has added."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
