"""Trainer: packed batches in, checkpoints out, on one device a worker."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from sora_fast.graphs import CudaRecorder, Graph
from sora_fast.proof import prove_at_start
from sora_fast.training import checkpoint, optim, replay
from sora_fast.training.compiling import compile_loss
from sora_fast.training.data.batches import Batch, Batches
from sora_fast.training.data.prefetch import prefetch
from sora_fast.training.data.sources import Source
from sora_fast.training.distributed import World, local_rank
from sora_fast.training.flops import FlopCount
from sora_fast.training.guard import Diverged, Guard
from sora_fast.training.interruption import Interruption, Stopped
from sora_fast.training.meter import Meter
from sora_fast.training.recompute import recompute
from sora_fast.training.run import CHECKPOINTS, LOG, Networks, RunConfig, check_resumable, create_run, update_run
from sora_fast.training.runlog import RunLog
from sora_fast.training.step import NoisyPack, PackLoss, StepPacks, WholeStep, drawn, take_gradients, update
from sora_fast.training.watchers import Watcher, Watchers

log = logging.getLogger(__name__)


class Trainer:
    """Trains the networks of a RunConfig on a source, in a run's folder.

    Every random number is a function of the seed and of the step or sample that it is for; so a checkpoint needs no
    generator states, and a resumed run continues the loss curve to the bit (on a CPU, limited by steps).

    Where torch.distributed is set up, with gloo for the CPU (see `distributed.joined`), every worker makes a Trainer
    with the same arguments and calls `fit`; rank 0 alone writes. A step is then of as many packs, planned together, and
    its loss and gradient are those of the mean over all their pixels.

    folder: made, with config.json in it; with resume=True it holds a run, which goes on from its newest checkpoint.
    config: of a resumed run, a changed one takes the place of config.json; ValueError if its checkpoints do not fit.
    watchers: what is told of the run as it goes on, by rank 0.
    """

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        folder: Path | str,
        *,
        device: torch.device | str = "cpu",
        resume: bool = False,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self.config, self.folder, self.device = config.train, Path(folder), torch.device(device)
        self.world = World.current()
        self.leads = self.world.rank == 0
        if resume:
            check_resumable(self.folder, config)
        leads = local_rank() == 0  # of its machine: each may have GPUs of its own
        prove_at_start(self.device, config.dtypes, leads=leads, wait=lambda: self.world.total(0))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.networks = self._built(config).to(self.device)
        self.parameters = self.networks.trained()
        c = self.config
        self.optimizers = optim.build_optimizers(
            self.parameters,
            c.optimizer,
            lr=c.lr,
            weight_decay=c.weight_decay,
            betas=c.betas,
            muon_ratio=c.muon_ratio,
            capturable=c.graph or None,
        )
        self.schedule = optim.Schedule(c.warmup, c.decay)
        self.average = optim.WeightAverage(self.parameters, c.ema_decay)
        self.batches = Batches(
            source,
            c.batch,
            patch_size=self.networks.patch_size,
            codec=self.networks.codec,
            text=self.networks.text,
            seed=c.seed,
            world=self.world,
            workers=c.workers,
        )
        self.generator = torch.Generator(self.device)
        self._no_prompts = self.networks.no_prompts(c.batch)
        self.compiling: str | None = None
        self.loss = self._applied(PackLoss(self.networks, c.precision))
        self._graph = self._captured() if c.graph and config.distilled is None else None
        self.step, self.seconds = 0, 0.0
        self._updating = False  # weights of two steps are no state to save
        self._compiled = c.compile is None
        self._guard = Guard(c.nonfinite_limit)
        self._saved: tuple[int, Path] | None = None
        self._resume_state = self.batches.state_dict()
        self._watchers = Watchers(watchers if self.leads else ())
        self._flops = self._counted()
        self._meter = Meter(self.device, config.dtypes[0], workers=self.world.size)
        self._log = RunLog(self.folder / LOG, self._meter, self._watchers)
        if resume:
            self._load()
        # Nobody writes before everybody has read.
        self.world.total(0)
        if self.leads and resume:
            self._log.cut(self.step)
            update_run(self.folder, config)
        elif self.leads:
            create_run(self.folder, config)

    def fit(self, *, progress: bool = True) -> bool:
        """Train to the end of the run, or until Ctrl-C or SIGTERM, which save. True if the run is at its end.

        A step whose loss or gradient is not finite changes nothing but the number of steps; after `nonfinite_limit` in
        a row it is over: Diverged (a FloatingPointError), with the packs of the first kept for a replay.
        """
        with (
            Interruption() as interruption,
            _bar(self._progress(), progress and self.leads) as bar,
            contextlib.closing(self._prefetched()) as batches,
        ):
            try:
                self._take_steps(batches, interruption, bar)
                self._guard.settle()
            except Diverged as error:
                self._keep(error)
                raise
            if self.leads:
                self.save()
                self._watchers.ended()
        self.world.total(0)  # whoever goes on from here finds it saved
        return self._progress() >= 1

    def _take_steps(self, batches: Iterator[Batch], interruption: Interruption, bar: tqdm) -> None:
        began, stop = time.monotonic() - self.seconds, False
        while (done := self._progress()) < 1 and not stop:
            try:
                # A request of one worker alone must not keep the others waiting, in a step that it has left.
                with interruption.at_once(when=self.world.size == 1):
                    taken = self._taken(batches)
                if len(taken) < self.config.accumulate:
                    return
                self._train_on(taken, done, interruption)
            except Stopped:
                self.networks.zero_grad()  # of half a step
                return
            except Diverged:
                raise
            except Exception:
                # Ctrl-C reaches the C++ compiler too; what it then makes of the first step is no error.
                if interruption.requested and not self._updating:
                    return
                raise
            # The workers go by one clock, and stop after the same step.
            seconds, requests = self.world.total(time.monotonic() - began, interruption.requested)
            self.seconds, stop = seconds / self.world.size, requests > 0
            if self.leads:
                self._record(bar, self._progress() - done)

    def _taken(self, batches: Iterator[Batch]) -> list[Batch]:
        """Those of the next step, one for each of its packs; fewer if there are no more."""
        with self._meter.waiting():
            return list(islice(batches, self.config.accumulate))

    def _keep(self, error: Diverged) -> None:
        """What a run that is over leaves behind: its log, and the step for a replay."""
        if self.leads:
            self._log.flush(self.seconds)
        kept = replay.save(self.folder, self.world.rank, error.step, self.networks, error.packs)
        log.warning("the packs of step %d are kept in %s", error.step, kept)

    def _record(self, bar: tqdm, progress: float) -> None:
        bar.update(progress)
        if self.step % self.config.log_every == 0:
            bar.set_postfix_str(self._log.flush(self.seconds))
        self._watchers.stepped(self.step, self.average.tensors)
        if self.step % self.config.save_every == 0:
            try:
                self.save()
            except (OSError, SafetensorError) as error:
                # Hours of training are worth more than one checkpoint; the last one of the run must succeed.
                log.warning(
                    "the checkpoint of step %d could not be written (%s); the one before is whole; training goes on",
                    self.step,
                    error,
                )

    def save(self) -> Path:
        """Write a checkpoint of the state between two steps, unless the newest is of this step already."""
        self._log.flush(self.seconds)
        if self._saved is not None and self._saved[0] == self.step:
            return self._saved[1]
        tensors = {
            "model": {name: p.detach() for name, p in self.parameters.items()},
            "ema": self.average.tensors,
            "optimizer": optim.optimizer_tensors(self.optimizers, self.parameters),
            **self._further(),
        }
        state = {"seconds": self.seconds, "batches": self._resume_state}
        path = checkpoint.save(self.folder / CHECKPOINTS, self.step, tensors, state, keep=self.config.keep)
        self._saved = self.step, path
        return path

    def _load(self) -> None:
        saved = checkpoint.latest(self.folder / CHECKPOINTS)
        if saved is None:  # stopped before its first checkpoint
            return
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved.tensors["model"][name])
        self.average.load(saved.tensors["ema"])
        optim.load_optimizer_tensors(self.optimizers, self.parameters, saved.tensors["optimizer"])
        self.step, self.seconds = saved.step, saved.state["seconds"]
        self._resume_state = saved.state["batches"]
        self.batches.load_state_dict(self._resume_state)
        self._take_in(saved)

    # What a trainer of another network has in place of these.

    def _built(self, config: RunConfig) -> Networks:
        return Networks(config)

    def _counted(self) -> FlopCount:
        return FlopCount(self.networks.model)

    def _further(self) -> dict[str, dict[str, Tensor]]:
        """Groups of tensors that a checkpoint holds beside the usual ones."""
        return {}

    def _take_in(self, saved: checkpoint.Checkpoint) -> None:
        """What `_further` gave."""

    @property
    def skipped_steps(self) -> int:
        """Steps that were left out as not finite, of those since this trainer was made, as far as they are known."""
        return self._log.left_out

    def _applied(self, loss: PackLoss) -> PackLoss:
        """With recomputation and compilation, as the configuration asks for them."""
        c = self.config
        if c.recompute is not None:
            recompute(self.networks.model.blocks, c.recompute)
        if c.compile is not None:
            blocks, options = self.networks.model.blocks, {"backend": c.compile, "scope": c.compile_scope}
            self.compiling = compile_loss(loss, blocks, **options, device=self.device)
        return loss

    def _captured(self) -> Graph[StepPacks]:
        """The whole step as a graph. ValueError where there can be none."""
        if self.world.size > 1:
            raise ValueError(f"graph: True, but a step of {self.world.size} workers exchanges its gradients in between")
        whole = WholeStep(self.loss, self.parameters, self.optimizers, self.average, self.config.clip_norm)
        return Graph(whole, CudaRecorder(self.device))

    def _progress(self) -> float:
        """The share of the run that is over."""
        if self.config.steps is not None:
            return min(1.0, self.step / self.config.steps)
        return min(1.0, self.seconds / (60 * self.config.minutes))

    def _prefetched(self) -> Iterator[Batch]:
        """Batches made ahead in a thread; for a GPU in page-locked memory, so that the copy does not wait."""
        # An earlier `fit` that was stopped has made more than it took.
        self.batches.load_state_dict(self._resume_state)
        batches = iter(self.batches)
        if self.device.type == "cuda":
            batches = (batch.pin_memory() for batch in batches)
        return prefetch(batches, in_step=self.batches.exchanges)

    def _train_on(self, batches: Sequence[Batch], progress: float, interruption: Interruption) -> None:
        """One optimiser step; nothing in it waits for the device."""
        c = self.config
        lr = c.lr * self.schedule(self.step, progress)
        optim.set_lr(self.optimizers, lr)
        self.average.set_step(self.step)
        packs = self._packs(batches)
        if self._graph is not None:
            self._updating = True
            loss, norm, bad = self._graph(StepPacks(tuple(packs)))
        else:
            # The first step compiles, which may take minutes.
            with interruption.at_once(when=self.world.size == 1 and not self._compiled):
                loss = take_gradients(self.loss, packs, list(self.parameters.values()), self.world)
            self._updating = True
            norm, bad = update(self.parameters, self.optimizers, self.average, loss, clip_norm=c.clip_norm)
        self._compiled = True
        self._updating = False
        self.step += 1
        self._resume_state = self._going_on(batches)
        self._note(batches, loss, norm, lr)
        self._guard.watch(self.step, packs, bad)

    def _going_on(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Where in the stream of batches a resumed run begins, after the step that took these."""
        return batches[-1].resume

    def _note(self, batches: Sequence[Batch], loss: Tensor, norm: Tensor, lr: float) -> None:
        """A row for the log."""
        (useful,) = self.world.total(sum(batch.useful for batch in batches))
        room = sum(batch.layout.capacity for batch in batches) * self.world.size
        self._meter.add(int(useful), sum(self._flops.batch(batch).step for batch in batches))
        row = {"lr": lr, "useful": int(useful), "padding": 1 - useful / room, "skipped": batches[-1].skipped}
        if self.leads:
            self._log.add(loss, norm, {"step": self.step} | row)

    def _packs(self, batches: Sequence[Batch]) -> list[NoisyPack]:
        """Those of this worker's next step, on the device, with what is random about them."""
        packs = []
        for number, batch in enumerate(batches):
            entropy = (self.config.seed, self.step, self.world.rank, *([number] if number else []))
            batch = batch.to(self.device, non_blocking=True)
            random = self.generator, entropy, self.config.clean_share
            packs.append(drawn(batch, self.networks.path, *random, no_prompts=self._no_prompts))
        return packs


def _bar(done: float, shown: bool) -> tqdm:
    layout = "{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    return tqdm(total=1.0, initial=done, bar_format=layout, disable=not shown, dynamic_ncols=True)
