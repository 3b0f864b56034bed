"""Processes that make batches, of which any may die at any moment.

A batch has the same shapes every time, so the tensors cross over in shared memory that is allocated once: a worker
writes into a slot what is then copied out of it. (torch's DataLoader hands over memory of the worker's own, and gives
up altogether when a worker is killed.) Packs go to whoever is free and come back in order. What a worker is reading
stands in shared memory too, for it to be known of what it died: that is left out from then on, another worker takes
the place, and the pack is made anew.
"""

import contextlib
import ctypes
import logging
import multiprocessing as mp
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from typing import Any

import torch
from torch import Tensor

from sora_fast.training.data.batch import Batch
from sora_fast.training.data.making import Made, Maker
from sora_fast.training.data.plan import LAG, Pack
from sora_fast.training.data.sources import sample_name

log = logging.getLogger(__name__)

# Packs that each worker has, the one in the making included: it need not wait while the main process is busy.
_AHEAD = 2
# Deaths in a row of each worker, without a batch in between, of which nothing can be blamed: all may end at once, as
# schedulers end them.
_MOST_DEATHS = 3
# The exit code of a process of which nobody knows: the server that it was forked from, and that would know, is dead.
_UNKNOWN = 255
_NOWHERE = -1
# How often, and after how many seconds each, a server of forks that refuses is asked again.
_MOST_REFUSALS, _PAUSE = 50, 0.1


@dataclass(eq=False)
class _Task:
    """A pack on its way. without: what it was or is made without; reply: what came back for it; None: not yet."""

    pack: Pack
    slot: int
    without: frozenset[str] = frozenset()
    reply: Any = None
    given: bool = False


@dataclass(eq=False)
class _Worker:
    process: Any
    pipe: connection.Connection
    tasks: deque[_Task] = field(default_factory=deque)


class MakerPool:
    """`count` processes that make batches with `maker`; see `made`. `lose(name, reason)` is told of what killed one."""

    def __init__(self, maker: Maker, count: int, lose: Callable[[str, str], None]) -> None:
        # A fork of this process would inherit locks that other threads hold; a fork of a server is as quick.
        method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
        self._context = mp.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload([__name__])
        self._maker, self._lose, self._deaths = maker, lose, 0
        self._template = maker.make(Pack((), (), None, 0, {})).batch.to("meta")
        self._slots = count * _AHEAD
        if self._slots >= LAG:
            raise ValueError(f"workers: {count}; there can be {LAG // _AHEAD - 1} at most")
        self._memory = self._context.RawArray(ctypes.c_byte, self._slots * _bytes(self._template))
        self._reading = self._context.RawArray(ctypes.c_int64, count)
        self._workers = [self._started(rank) for rank in range(count)]

    def made(self, packs: Iterable[Pack], lost: dict[str, str]) -> Iterator[Made]:
        """The batches of the packs, in order. lost: what is left out of them, as it stands when each is handed out."""
        coming, tasks = iter(packs), deque()
        while True:
            while len(tasks) < self._slots:
                tasks.append(_Task(next(coming), slot=self._free_slot(tasks)))
            self._give(tasks, lost)
            first = tasks[0]
            if first.reply is None:
                self._listen()
                continue
            if not first.without.issuperset(self._names(first.pack) & lost.keys()):
                first.reply, first.given = None, False  # of this, something has been lost meanwhile
                continue
            tasks.popleft()
            useful, *rest = first.reply
            batch = laid_out(self._template, self._memory, first.slot)._map(Tensor.clone)
            yield Made(replace(batch, useful=useful, skipped=first.pack.skipped, resume=first.pack.resume), *rest)

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for worker in self._workers:
            worker.process.kill()
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join()

    def _free_slot(self, tasks: Iterable[_Task]) -> int:
        return min(set(range(self._slots)) - {task.slot for task in tasks})

    def _names(self, pack: Pack) -> set[str]:
        return {sample_name(self._maker.source, index) for index in pack.indices}

    def _give(self, tasks: Iterable[_Task], lost: dict[str, str]) -> None:
        """Each pack that nobody has, the oldest first, to the worker with the fewest."""
        for task in tasks:
            worker = min(self._workers, key=lambda worker: len(worker.tasks))
            if not task.given and len(worker.tasks) < _AHEAD:
                task.given, task.without = True, frozenset(lost.keys() & self._names(task.pack))
                worker.tasks.append(task)
                try:
                    worker.pipe.send((task.pack, task.slot, task.without))
                except OSError:  # it is dead, as `_listen` will find
                    return

    def _listen(self) -> None:
        """Wait for replies and deaths."""
        pipes = {worker.pipe: worker for worker in self._workers}
        ends = {worker.process.sentinel: rank for rank, worker in enumerate(self._workers)}
        ready = connection.wait([*pipes, *ends])
        for pipe in pipes.keys() & set(ready):
            try:
                reply = pipe.recv()
            except (EOFError, OSError):  # it is dead
                continue
            if isinstance(reply, str):
                raise RuntimeError(f"a data worker failed:\n{reply}")
            pipes[pipe].tasks.popleft().reply, self._deaths = reply, 0
        for end in ends.keys() & set(ready):
            self._bury(ends[end])

    def _bury(self, rank: int) -> None:
        """Say what a worker died of, let another one take its place, and its packs be made anew."""
        worker, index = self._workers[rank], self._reading[rank]
        worker.process.join()
        worker.pipe.close()
        if worker.process.exitcode == _UNKNOWN:  # it may be alive, and must not write any more
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGKILL)
        for task in worker.tasks:
            task.given = False
        how = _ending(worker.process.exitcode)
        # SIGTERM is sent by people and schedulers, never by a decoder.
        if index != _NOWHERE and worker.process.exitcode not in (-signal.SIGTERM, _UNKNOWN):
            self._lose(sample_name(self._maker.source, index), f"a data worker that was reading it {how}")
        else:
            self._deaths += 1
            log.warning("a data worker %s, by no fault of a file; another one takes its place", how)
        if self._deaths >= _MOST_DEATHS * len(self._workers):
            raise RuntimeError(f"{self._deaths} data workers died one after the other; the last {how}")
        self._workers[rank] = self._started(rank)

    def _started(self, rank: int) -> _Worker:
        here, there = self._context.Pipe()
        self._reading[rank] = _NOWHERE
        arguments = (there, self._maker, self._template, self._memory, self._reading, rank)
        process = self._context.Process(target=_work, args=arguments, name=f"batches-{rank}", daemon=True)
        _start(process)
        there.close()
        return _Worker(process, here)


def _start(process: Any) -> None:
    """A server of forks that has just died refuses for a moment, until multiprocessing misses it and starts another."""
    for _ in range(_MOST_REFUSALS):
        try:
            return process.start()
        except ConnectionRefusedError:
            time.sleep(_PAUSE)
    process.start()


def _work(pipe: connection.Connection, maker: Maker, template: Batch, memory: Any, reading: Any, rank: int) -> None:
    """What a worker does until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process sees to the end
    torch.set_num_threads(1)  # the others are for the training step
    while True:
        try:
            pack, slot, without = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            made = maker.make(pack, without=without, at=lambda index: reading.__setitem__(rank, index))
            reading[rank] = _NOWHERE
            if (dtype := made.batch.latents.flat.dtype) != template.latents.flat.dtype:
                raise TypeError(f"codec: latents of {dtype}; data workers need {template.latents.flat.dtype}")
            laid_out(template, memory, slot).copy_(made.batch)
            reply: Any = made.batch.useful, made.captions, made.lost, made.notes
        except Exception:
            reply = traceback.format_exc()
        pipe.send(reply)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"


def _bytes(template: Batch) -> int:
    """Of a slot."""
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += _padded(tensor)
        return tensor

    template._map(count)
    return total


def _padded(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // 64) * 64


def laid_out(template: Batch, memory: Any, slot: int) -> Batch:
    """A batch like the template whose tensors lie in a slot of the shared memory."""
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    place = slot * _bytes(template)

    def view(tensor: Tensor) -> Tensor:
        nonlocal place
        size = tensor.numel() * tensor.element_size()
        part = flat[place : place + size].view(tensor.dtype).view(tensor.shape)
        place += _padded(tensor)
        return part

    return template._map(view)
