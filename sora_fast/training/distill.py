"""Distillation: a trained run's model becomes a flow map, which makes a video in a few calls without guidance.

The new run has a folder of its own, as `train` makes one, and in its RUN/teacher the weights that it began with.
"""

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sora_fast.diffusion.flow_map import FlowPack, Lesson, Trajectory, draw_ways, flow_map_loss
from sora_fast.files import check_folder
from sora_fast.packing import PackedLayout, RaggedLatents
from sora_fast.packing._bundle import TensorBundle
from sora_fast.training import checkpoint
from sora_fast.training.compiling import compile_loss
from sora_fast.training.data.batches import Batch, Prompts
from sora_fast.training.data.sources import Source
from sora_fast.training.options import DISTILL_CHANGEABLE, DistillOptions, spelled
from sora_fast.training.precision import computing
from sora_fast.training.recompute import recompute
from sora_fast.training.run import (
    CHECKPOINTS,
    Distilled,
    Networks,
    RunConfig,
    TrainConfig,
    check_new,
    moved,
    read_run,
)
from sora_fast.training.step import NoisyPack, PackLoss, drawn, reseed
from sora_fast.training.trainer import Trainer
from sora_fast.training.watchers import Watcher

TEACHER = "teacher"
# The average is 100 steps behind at the most: runs are short.
EMA_DECAY = 0.99
# Packs to a trajectory, and trajectories that are kept. In ten minutes of the demo on one core: 80 trajectories, each
# for 25 packs, are learned by heart (the square of what the last of 4 jumps misses is 0.9% of its way's on those, 1.5%
# on others) and make 87.5% of the digits right; 240, each for 8 packs, 91.2%.
LESSONS, KEPT = 8, 64


def distilled_config(teacher: RunConfig, train: TrainConfig, distilled: Distilled) -> RunConfig:
    """The configuration of a run that distils a teacher's. ValueError if it cannot be distilled."""
    if teacher.distilled is not None:
        raise ValueError("the run is distilled already; distil the one that it came from")
    return replace(teacher, model=replace(teacher.model, sigma_end=True), train=train, distilled=distilled)


def new_distillation(o: DistillOptions) -> RunConfig:
    """The configuration that is asked for. ValueError if there is a run, or none can be made."""
    check_new(o.folder)
    check_folder(o.folder)
    teacher = _with_data(o.run, moved(read_run(o.run), data=o.data, text_encoder=o.text_encoder))
    train = replace(
        teacher.train,
        steps=None,
        minutes=o.minutes,
        batch=replace(teacher.train.batch, drop=None),  # what a sampler makes is whole
        lr=teacher.train.lr / 2 if o.lr is None else o.lr,
        ema_decay=min(teacher.train.ema_decay, EMA_DECAY),
        compile=None if o.no_compile else teacher.train.compile,
        seed=o.seed,
    )
    given = o.guidance if o.guidance_given is None else o.guidance_given
    return distilled_config(teacher, train, Distilled(o.steps, o.guidance, given, spacing="late"))


def resumed_distillation(o: DistillOptions) -> RunConfig:
    """What the run in `o.folder` was made with, changed as far as it can be. ValueError if more is to be changed."""
    if fixed := sorted(o.given - {"resume", "device", "out"} - set(DISTILL_CHANGEABLE)):
        raise ValueError(
            f"{spelled(fixed)}: a run keeps what it was made with; beside --resume there can be "
            f"{spelled(DISTILL_CHANGEABLE)}"
        )
    config = read_run(o.folder)
    if config.distilled is None:
        raise ValueError(f"{o.folder} was not made by `sora-fast distill`; it cannot be resumed by it")
    config = _with_data(o.folder, moved(config, data=o.data, text_encoder=o.text_encoder))
    changes = {"minutes": o.minutes} if "minutes" in o.given else {}
    if o.no_compile:
        changes["compile"] = None
    return replace(config, train=replace(config.train, **changes))


def _with_data(run: Path, config: RunConfig) -> RunConfig:
    """The same; ValueError if its folder of data is not there."""
    if config.data is None:
        raise ValueError(
            f"{run} was trained on a source made in Python; give that to a Distiller (training/distill.py)"
        )
    if not Path(config.data.folder).is_dir():
        raise ValueError(f"{config.data.folder} is no folder; say where the run's data is now: --data FOLDER")
    return config


def keep_teacher(run: Path | str, folder: Path | str) -> None:
    """Copy the newest averaged weights of a run to where `Distiller` begins with them, in a new run's folder.

    ValueError if there is no checkpoint in `run`, or a run in `folder` already.
    """
    run, folder = Path(run), Path(folder)
    check_new(folder)
    read_run(run)
    saved = checkpoint.latest(run / CHECKPOINTS, groups=("ema",))
    if saved is None:
        raise ValueError(f"{run} holds no checkpoint yet; train it first")
    checkpoint.save(folder / TEACHER, saved.step, {"ema": saved.tensors["ema"]}, {}, keep=1)


@dataclass(frozen=True, eq=False)
class Shown(Batch):
    """A batch, and what the teacher makes in its place: of the same captions and shapes, and frames that are `clean`
    ([N] bool, tokens)."""

    clean: Tensor
    trajectory: Trajectory


@dataclass(frozen=True, eq=False)
class LessonPack(TensorBundle):
    """All that the loss of a step's pack depends on, beside the weights. clean: [N] bool, tokens given as they are."""

    latents: RaggedLatents
    layout: PackedLayout
    prompts: Prompts | None
    clean: Tensor
    lesson: Lesson


class LessonLoss(PackLoss):
    """LessonPack → its loss and pixels, as `PackLoss` has them."""

    def forward(self, pack: LessonPack) -> tuple[Tensor, Tensor]:
        networks, lesson = self.networks, pack.lesson
        flow = FlowPack(pack.latents, pack.layout, networks.path, clean=pack.clean, patch_size=networks.patch_size)
        with computing(self.precision, lesson.x.device.type):
            clean = flow.predict(networks, lesson.x, lesson.level, lesson.end, prompts=pack.prompts)
            return flow_map_loss(flow, clean, lesson.target, lesson.level)


class Teacher:
    """Makes trajectories, with the guidance that is to be built in.

    networks: as they were, without the second level. null_prompts: what guidance leads away from; None: the teacher is
    asked once, without.
    """

    def __init__(self, networks: Networks, distilled: Distilled, null_prompts: Prompts | None) -> None:
        self.networks, self.distilled, self.null_prompts = networks, distilled, null_prompts

    @property
    def calls(self) -> int:
        """Of the model, for a trajectory."""
        return self.distilled.teacher_steps * (1 if self.null_prompts is None else 2)

    @torch.no_grad()
    def show(self, pack: NoisyPack, precision: str) -> Trajectory:
        """From a pack's noise to data."""
        networks = self.networks
        flow = FlowPack(pack.latents, pack.layout, networks.path, clean=pack.clean, patch_size=networks.patch_size)
        scale = flow.spread(torch.where(flow.given, self.distilled.guidance_given, self.distilled.guidance))

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            given = flow.ask(networks, x, sigma, None, prompts=pack.prompts)
            if self.null_prompts is None:
                return given
            return torch.lerp(flow.ask(networks, x, sigma, None, prompts=self.null_prompts), given, scale)

        levels = networks.path.sigmas(self.distilled.teacher_steps, pack.layout, spacing=self.distilled.spacing)
        with computing(precision, pack.noise.device.type):
            return flow.trajectory(guided, pack.noise, levels)


class Distiller(Trainer):
    """Trains a flow map; all that is not said here is as in `Trainer`.

    folder: `keep_teacher` was there. config: see `distilled_config`.

    Every LESSONS packs the teacher makes a trajectory more, of the next batch, and a pack is one of the newest KEPT,
    with other ways along it. They stay on the device: of each, `teacher_steps` + 1 times the latents of a batch.
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
        saved = checkpoint.latest(Path(folder) / TEACHER)
        if saved is None:
            raise ValueError(f"{Path(folder) / TEACHER}: no weights to begin with are there")
        self._weights = saved.tensors["ema"]
        super().__init__(config, source, folder, device=device, resume=resume, watchers=watchers)
        if self.step == 0:
            self._begin()
        self._number = max(0, self._due - KEPT)  # of the next trajectory
        self._shown: deque[Shown] = deque(maxlen=KEPT)
        # Where in the stream of batches that of each begins: a resumed run makes them anew.
        self._places = deque([self._resume_state], maxlen=KEPT + 1)

    @torch.no_grad()
    def _begin(self) -> None:
        """With the teacher's weights; those of the second level, which it has not, start as they are."""
        for name, value in self._weights.items():
            self.parameters[name].copy_(value)
        self.average.load({name: p.detach() for name, p in self.parameters.items()})

    def _applied(self, loss: PackLoss) -> LessonLoss:
        c, config = self.config, loss.networks.config
        self._teacher = Teacher(self._untrained(config), config.distilled, self._null_prompts(config.distilled))
        lessons = LessonLoss(loss.networks, c.precision)
        models = [networks.model for networks in (lessons.networks, self._teacher.networks)]
        if c.recompute is not None:
            recompute(models[0].blocks, c.recompute)
        if c.compile is not None:
            blocks = [block for model in models for block in model.blocks]
            # The teacher's too, which is no part of the loss: they are what compiles once.
            options = {"backend": c.compile, "scope": "blocks", "device": self.device}
            self.compiling = compile_loss(lessons, blocks, **options)
        return lessons

    def _untrained(self, config: RunConfig) -> Networks:
        """The networks with the weights that the run began with, and a text encoder that stays as it is."""
        text = self.networks.text
        plain = Networks(replace(config, text=None, model=replace(config.model, sigma_end=False), distilled=None))
        trained = text is not None and any(p.requires_grad for p in text.parameters())
        plain.text = copy.deepcopy(text) if trained else text
        with torch.no_grad():
            for name, parameter in plain.trained().items():
                parameter.copy_(self._weights[name])
        return plain.to(self.device).requires_grad_(False)

    def _null_prompts(self, distilled: Distilled) -> Prompts | None:
        batch = self.config.batch
        if self.networks.text is None or distilled.guidance == distilled.guidance_given == 1:
            return None
        ids, layout = self.networks.text.tokenize(
            [""] * batch.max_segments, capacity=batch.text_capacity, max_segments=batch.max_segments
        )
        return Prompts(ids, layout).to(self.device)

    @property
    def _due(self) -> int:
        """Trajectories that there have been when the next step is taken."""
        return self.step * self.config.accumulate // LESSONS + 1

    def _taken(self, batches: Iterator[Batch]) -> list[Batch]:
        while self._number < self._due:
            with self._meter.waiting():
                batch = next(batches, None)
            if batch is None:
                return []
            self._shown.append(self._show(batch))
            self._places.append(batch.resume)
            self._number += 1
        chosen = np.random.default_rng(self._entropy(self.step, 0))
        return [self._shown[i] for i in chosen.integers(len(self._shown), size=self.config.accumulate)]

    def _show(self, batch: Batch) -> Shown:
        """What the teacher makes of it."""
        path, share = self.networks.path, self.config.clean_share
        on_device = batch.to(self.device, non_blocking=True)
        pack = drawn(on_device, path, self.generator, self._entropy(self._number, 1), share)
        trajectory = self._teacher.show(pack, self.config.precision)
        self._meter.add(0, self._teacher.calls * self._flops.batch(batch).forward)
        return Shown(**_fields(batch), clean=pack.clean, trajectory=trajectory)

    def _packs(self, batches: Sequence[Shown]) -> list[LessonPack]:
        reseed(self.generator, self._entropy(self.step, 2))
        distilled = self.networks.config.distilled
        packs = []
        for shown in batches:
            batch = shown.to(self.device, non_blocking=True)
            flow = FlowPack(
                batch.latents, batch.layout, self.networks.path, clean=batch.clean, patch_size=self.networks.patch_size
            )
            ways = draw_ways(
                distilled.teacher_steps,
                distilled.steps,
                batch.layout.max_segments,
                device=self.device,
                generator=self.generator,
            )
            lesson = batch.trajectory.lesson(flow, *ways)
            packs.append(LessonPack(batch.latents, batch.layout, batch.prompts, batch.clean, lesson))
        return packs

    def _going_on(self, batches: Sequence[Batch]) -> dict[str, Any]:
        first = max(0, self._due - KEPT)  # that a resumed run makes
        return self._places[first - self._number - 1]

    def _entropy(self, number: int, kind: int) -> tuple[int, ...]:
        return (self.config.seed, number, self.world.rank, 0, kind)


def _fields(batch: Batch) -> dict[str, Any]:
    return {field.name: getattr(batch, field.name) for field in fields(batch)}
