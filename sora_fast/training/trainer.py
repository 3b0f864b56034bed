"""Trainer: packed batches in, checkpoints out, on one device a worker."""

import contextlib
import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sora_fast import files
from sora_fast.diffusion.clean import clean_frames, random_clean_ends
from sora_fast.diffusion.losses import counted_loss
from sora_fast.diffusion.noise import noise_like
from sora_fast.models import SoraDiT
from sora_fast.packing import PackedLayout, RaggedLatents
from sora_fast.proof import prove_at_start
from sora_fast.training import checkpoint, optim
from sora_fast.training.batches import Batch, Batches, Prompts, prefetch
from sora_fast.training.compiler import cpp_problem
from sora_fast.training.data import Source
from sora_fast.training.distributed import World, local_rank
from sora_fast.training.run import CHECKPOINTS, LOG, Networks, RunConfig, check_resumable, create_run, update_run

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
    """

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        folder: Path | str,
        *,
        device: torch.device | str = "cpu",
        resume: bool = False,
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
            self.networks = Networks(config).to(self.device)
        self.parameters = self.networks.trained()
        c = self.config
        self.optimizers = optim.build_optimizers(
            self.parameters,
            c.optimizer,
            lr=c.lr,
            weight_decay=c.weight_decay,
            betas=c.betas,
            muon_ratio=c.muon_ratio,
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
        )
        self.generator = torch.Generator(self.device)
        self.compiles = c.compile is not None and self._can_compile(c.compile)
        if self.compiles:
            compile_blocks(self.networks.model, c.compile)
        self.step, self.seconds = 0, 0.0
        self._updating = False  # weights of two steps are no state to save
        self._saved: tuple[int, Path] | None = None
        self._resume_state = self.batches.state_dict()
        self._log = RunLog(self.folder / LOG)
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
        """Train to the end of the run, or until Ctrl-C, which saves. True if the run is at its end."""
        began = time.monotonic() - self.seconds
        done, stop = self._progress(), False
        with (
            _Interruption() as interruption,
            _bar(done, progress and self.leads) as bar,
            contextlib.closing(self._prefetched()) as batches,
        ):
            for batch in batches:
                if done >= 1 or stop:
                    break
                try:
                    self._train_on(batch, done)
                except Exception:
                    # Ctrl-C reaches the C++ compiler too; what it then makes of the first step is no error.
                    if interruption.requested and not self._updating:
                        break
                    raise
                # The workers go by one clock, and stop after the same step.
                seconds, requests = self.world.total(time.monotonic() - began, interruption.requested)
                self.seconds, stop = seconds / self.world.size, requests > 0
                previous, done = done, self._progress()
                if self.leads:
                    self._record(bar, done - previous)
            if self.leads:
                self.save()
        self.world.total(0)  # whoever goes on from here finds it saved
        return done >= 1

    def _record(self, bar: tqdm, progress: float) -> None:
        bar.update(progress)
        if self.step % self.config.log_every == 0:
            bar.set_postfix_str(self._log.flush(self.seconds))
        if self.step % self.config.save_every == 0:
            self.save()

    def save(self) -> Path:
        """Write a checkpoint of the state between two steps, unless the newest is of this step already."""
        self._log.flush(self.seconds)
        if self._saved is not None and self._saved[0] == self.step:
            return self._saved[1]
        tensors = {
            "model": {name: p.detach() for name, p in self.parameters.items()},
            "ema": self.average.tensors,
            "optimizer": optim.optimizer_tensors(self.optimizers, self.parameters),
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

    def _can_compile(self, backend: str) -> bool:
        """Where that cannot work the blocks stay as they are, with a warning."""
        if backend != "inductor" or self.device.type != "cpu" or not (problem := cpp_problem()):
            return True
        if self.leads:
            log.warning("training without torch.compile, which is slower: it needs a C++ compiler, but %s", problem)
        return False

    def _progress(self) -> float:
        """The share of the run that is over."""
        if self.config.steps is not None:
            return min(1.0, self.step / self.config.steps)
        return min(1.0, self.seconds / (60 * self.config.minutes))

    def _prefetched(self) -> Iterator[Batch]:
        """Batches made ahead in a thread; for a GPU in page-locked memory, so that the copy does not wait."""
        batches = iter(self.batches)
        if self.device.type == "cuda":
            batches = (batch.pin_memory() for batch in batches)
        return prefetch(batches, in_step=self.batches.exchanges)

    def _train_on(self, batch: Batch, progress: float) -> None:
        """One optimiser step; nothing in it waits for the device."""
        c = self.config
        batch = batch.to(self.device, non_blocking=True)
        lr = c.lr * self.schedule(self.step, progress)
        optim.set_lr(self.optimizers, lr)
        loss, pixels = self._loss(batch.latents, batch.layout, batch.prompts, *self._draw(batch))
        loss.backward()
        loss = loss.detach()
        self.world.mean([loss, *(p.grad for p in self.parameters.values() if p.grad is not None)], pixels)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), c.clip_norm)
        self._updating = True
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._updating = False
        self.average.update(self.step)
        self.step += 1
        self._resume_state = batch.resume
        (useful,) = self.world.total(batch.useful)
        padding = 1 - useful / (batch.layout.capacity * self.world.size)
        if self.leads:
            row = {"lr": lr, "useful": int(useful), "padding": padding, "skipped": batch.skipped}
            self._log.add(loss, norm, {"step": self.step} | row)

    def _draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Noise level [S], noise [P] and clean tokens [N] of a step."""
        entropy = np.random.SeedSequence((self.config.seed, self.step, self.world.rank))
        self.generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
        sigma = self.networks.path.sample_sigma(batch.layout, self.generator)
        noise = noise_like(batch.latents, self.generator)
        ends = random_clean_ends(batch.layout, self.generator, share=self.config.clean_share)
        return sigma, noise, clean_frames(batch.layout, *ends)

    def _loss(
        self,
        latents: RaggedLatents,
        layout: PackedLayout,
        prompts: Prompts | None,
        sigma: Tensor,
        noise: Tensor,
        clean: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The mean over the pixels that count, and their number."""
        networks, half = self.networks, self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            return counted_loss(
                networks,
                latents,
                layout,
                networks.path,
                sigma,
                noise=noise,
                patch_size=networks.patch_size,
                clean=clean,
                prompts=prompts,
            )


def compile_blocks(model: SoraDiT, backend: str) -> None:
    """Compile the blocks, where the time goes: they share one graph, so the depth costs no compilation.

    (On 2 cores, 4 blocks of width 128: 40 s, where the whole loss in one graph took more than 150 s.)
    """
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)


class RunLog:
    """log.jsonl: one line a step. The numbers are fetched from the device in groups, not at every step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []
        self._values: list[Tensor] = []
        self._since = time.monotonic()
        self._summary = ""

    def add(self, loss: Tensor, norm: Tensor, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._values.append(torch.stack([loss.float(), norm.float()]))

    def flush(self, seconds: float) -> str:
        """Write what was added; returns one line about it. FloatingPointError if the loss is not finite any more."""
        if not self._rows:
            return self._summary
        values = torch.stack(self._values).tolist()
        rows = [row | {"loss": loss, "norm": norm} for row, (loss, norm) in zip(self._rows, values, strict=True)]
        elapsed, self._since = time.monotonic() - self._since, time.monotonic()
        rate = sum(row["useful"] for row in rows) / elapsed
        with self.path.open("a") as file:
            file.writelines(json.dumps(row | {"seconds": seconds, "tokens_per_s": rate}) + "\n" for row in rows)
        self._rows, self._values = [], []
        for row in rows:
            if not math.isfinite(row["loss"] + row["norm"]):
                raise FloatingPointError(f"the loss is not finite at step {row['step']}; resume with a smaller lr")
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("loss", "padding")}
        self._summary = (
            f"step {rows[-1]['step']}, loss {mean['loss']:.4f}, {rate:,.0f} useful tokens/s, "
            f"{mean['padding']:.1%} padding"
        )
        return self._summary

    def cut(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run writes it anew."""
        rows = [row for row in read_log(self.path) if row["step"] <= step]
        files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl: step, loss, norm, lr, useful, padding, skipped, seconds, tokens_per_s."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a killed run may leave half a line
            rows.append(json.loads(line))
    return rows


class _Interruption:
    """Turns the first Ctrl-C (or SIGTERM) into a request to stop after the step; the second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Interruption":
        with contextlib.suppress(ValueError):  # signals belong to the main thread; elsewhere there is nothing to do
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        tqdm.write("Stopping after this step, and saving. (Again: stop at once, without.)")


def _bar(done: float, shown: bool) -> tqdm:
    layout = "{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    return tqdm(total=1.0, initial=done, bar_format=layout, disable=not shown, dynamic_ncols=True)
