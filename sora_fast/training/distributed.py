"""Data-parallel training: workers that take the same steps on packs of their own, and average their gradients.

Rank 0 is the process that asked for the others: it keeps the run's folder, and is the one that the user sees.
"""

import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A worker that has not ended by itself so many seconds after rank 0 did is stopped.
_PATIENCE = 10.0
# Importing torch takes seconds, on a busy machine a minute.
_START = 300.0


@dataclass(frozen=True)
class World:
    """Which of how many workers this process is. Every worker must call every method, in the same order."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> "World":
        """Of torch.distributed, if it has been set up; else the only worker."""
        if dist.is_available() and dist.is_initialized():
            return World(dist.get_rank(), dist.get_world_size())
        return World()

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the workers, the same bits on all of them; one exchange for all."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.div_(self.size).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])

    def gather(self, tensor: Tensor) -> Tensor:
        """What the workers have, each the same shape [B, …], one after the other: [size · B, …]."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over the workers. The numbers live on the host: no accelerator is waited for."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        dist.all_reduce(sums)
        return sums.tolist()


@contextlib.contextmanager
def workers(size: int, function: Callable[..., Any], *arguments: Any) -> Iterator[World]:
    """Inside, this process is rank 0 of `size` workers on this machine's CPU; the others run function(*arguments).

    function, arguments: picklable. The cores are shared out evenly. A worker that fails takes the others along: their
    next exchange raises RuntimeError. RuntimeError too where torch.distributed is in use already.
    """
    if size < 1:
        raise ValueError(f"size: {size}; there must be at least one worker")
    if size == 1:
        yield World()
        return
    if dist.is_initialized():
        raise RuntimeError(f"workers: this process is {World.current()} already")
    threads = torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = _Meeting(size, str(Path(folder) / "meeting"), max(1, threads // size), context.Semaphore(0))
        others = [
            context.Process(target=_work, args=(rank, meeting, function, arguments), daemon=True)
            for rank in range(1, size)
        ]
        for process in others:
            process.start()
        try:
            _await(others, meeting)
            with meeting.joined(rank=0):
                yield World.current()
        finally:
            torch.set_num_threads(threads)
            for process in others:
                process.join(_PATIENCE)
                process.terminate()


@dataclass(frozen=True)
class _Meeting:
    """How the workers find each other. file: of the store; ready: a semaphore, raised by each that is about to come."""

    size: int
    file: str
    threads: int
    ready: Any

    @contextlib.contextmanager
    def joined(self, rank: int) -> Iterator[None]:
        # Small matrices gain little from a second thread; a worker of its own they fill.
        torch.set_num_threads(self.threads)
        dist.init_process_group("gloo", store=dist.FileStore(self.file, self.size), rank=rank, world_size=self.size)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _work(rank: int, meeting: _Meeting, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    meeting.ready.release()
    with meeting.joined(rank):
        function(*arguments)


def _await(processes: Sequence[Any], meeting: _Meeting) -> None:
    """Wait until every worker is about to join: joining would wait half an hour for one that cannot."""
    missing, deadline = len(processes), time.monotonic() + _START
    while missing:
        if meeting.ready.acquire(timeout=0.2):
            missing -= 1
            continue
        ended = [process.exitcode for process in processes if process.exitcode]
        if ended or time.monotonic() > deadline:
            raise RuntimeError(f"workers: {missing} of {len(processes)} did not start; exit codes {ended}")
