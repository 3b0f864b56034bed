"""Distillation: a trained run's model becomes a flow map, which makes a video in a few calls without guidance.

The new run has a folder of its own, as `train` makes one, and in its RUN/teacher the weights that it began with.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_fast.diffusion.flow_map import FlowPack, Interval, flow_map_loss, split_target
from sora_fast.files import check_folder
from sora_fast.training import checkpoint
from sora_fast.training.batches import Batch, Prompts
from sora_fast.training.compiling import compile_loss
from sora_fast.training.data import Source
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
from sora_fast.training.step import NoisyPack, PackLoss
from sora_fast.training.trainer import Trainer
from sora_fast.training.watchers import Watcher

TEACHER = "teacher"
# The jumps that are learned from should follow soon: the average is 100 steps behind, however long the run.
EMA_DECAY = 0.99


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
        lr=teacher.train.lr / 2 if o.lr is None else o.lr,
        ema_decay=min(teacher.train.ema_decay, EMA_DECAY),
        compile=None if o.no_compile else teacher.train.compile,
        seed=o.seed,
    )
    given = o.guidance if o.guidance_given is None else o.guidance_given
    return distilled_config(teacher, train, Distilled(o.steps, o.guidance, given))


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
class JumpPack(NoisyPack):
    """A pack, and what is to be learned from it: the teacher at `interval.taught`, or to jump over the interval.

    sigma: not used.
    """

    interval: Interval
    from_teacher: bool


class JumpLoss(PackLoss):
    """JumpPack → its loss and pixels, as `PackLoss` has them.

    teacher: the networks as they were, without the second level. slow: a running average of those that are trained.
    null_prompts: what guidance leads away from; None: the teacher is asked once, without.
    """

    def __init__(
        self, networks: Networks, precision: str, *, teacher: Networks, slow: Networks, null_prompts: Prompts | None
    ) -> None:
        super().__init__(networks, precision)
        self.teacher, self.slow, self.null_prompts = teacher, slow, null_prompts

    def forward(self, pack: JumpPack) -> tuple[Tensor, Tensor]:
        networks, at, prompts = self.networks, pack.interval, pack.prompts
        flow = FlowPack(pack.latents, pack.layout, networks.path, clean=pack.clean, patch_size=networks.patch_size)
        level, end = (at.taught, at.taught) if pack.from_teacher else (at.level, at.end)
        x = flow.at(pack.noise, level)
        with computing(self.precision, pack.noise.device.type):
            with torch.no_grad():
                if pack.from_teacher:
                    target = self._guided(flow, x, level, prompts)
                else:
                    target = split_target(flow, self.slow, x, at, prompts=prompts)
            return flow_map_loss(flow, flow.predict(networks, x, level, end, prompts=prompts), target, level)

    def _guided(self, flow: FlowPack, x: Tensor, sigma: Tensor, prompts: Prompts | None) -> Tensor:
        """The teacher's clean data [P] at levels [S]."""
        given = flow.predict(self.teacher, x, sigma, None, prompts=prompts)
        if self.null_prompts is None:
            return given
        without = flow.predict(self.teacher, x, sigma, None, prompts=self.null_prompts)
        d = self.networks.config.distilled
        return torch.lerp(without, given, flow.spread(torch.where(flow.given, d.guidance_given, d.guidance)))


class Distiller(Trainer):
    """Trains a flow map; all that is not said here is as in `Trainer`.

    folder: `keep_teacher` was there. config: see `distilled_config`.

    Half of the packs learn from the teacher, with guidance, at r = t; the others from two jumps of the model's own
    running average. The workers take turns, and each of them from step to step: either is two calls without gradient.
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
        self._teacher = saved.tensors["ema"]
        super().__init__(config, source, folder, device=device, resume=resume, watchers=watchers)
        if self.step == 0:
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """With the teacher's weights; those of the second level, which it has not, start as they are."""
        for name, value in self._teacher.items():
            self.parameters[name].copy_(value)
        self.average.load({name: p.detach() for name, p in self.parameters.items()})

    def _applied(self, loss: PackLoss) -> JumpLoss:
        c, config = self.config, loss.networks.config
        plain = replace(config, model=replace(config.model, sigma_end=False), distilled=None)
        jumps = JumpLoss(
            loss.networks,
            c.precision,
            teacher=self._twin(plain, self._teacher),
            slow=self._twin(config, self.average.tensors),
            null_prompts=self._null_prompts(config.distilled),
        )
        models = [networks.model for networks in (jumps.networks, jumps.teacher, jumps.slow)]
        if c.recompute is not None:
            recompute(models[0].blocks, c.recompute)
        if c.compile is not None:
            blocks = [block for model in models for block in model.blocks]
            # The loss itself has two forms, and calls the blocks three times: they are what compiles once.
            options = {"backend": c.compile, "scope": "blocks", "device": self.device}
            self.compiling = compile_loss(jumps, blocks, **options)
        return jumps

    def _twin(self, config: RunConfig, weights: dict[str, Tensor]) -> Networks:
        """Networks that share the memory of `weights`, if they are on the device, and a frozen text encoder."""
        text = self.networks.text
        twin = Networks(replace(config, text=None))
        trained = text is not None and any(p.requires_grad for p in text.parameters())
        twin.text = copy.deepcopy(text) if trained else text
        twin = twin.to(self.device)
        for name, parameter in twin.trained().items():
            parameter.data = weights[name].to(self.device)
        return twin.requires_grad_(False)

    def _null_prompts(self, distilled: Distilled) -> Prompts | None:
        batch = self.config.batch
        if self.networks.text is None or distilled.guidance == distilled.guidance_given == 1:
            return None
        ids, layout = self.networks.text.tokenize(
            [""] * batch.max_segments, capacity=batch.text_capacity, max_segments=batch.max_segments
        )
        return Prompts(ids, layout).to(self.device)

    def _packs(self, batches: Sequence[Batch]) -> list[NoisyPack]:
        from_teacher = (self.step + self.world.rank) % 2 == 0
        packs = super()._packs(batches)  # after which the generator goes on
        intervals = [Interval.draw(self.networks.path, pack.layout, self.generator) for pack in packs]
        return [
            JumpPack(**_fields(pack), interval=interval, from_teacher=from_teacher)
            for pack, interval in zip(packs, intervals, strict=True)
        ]


def _fields(pack: NoisyPack) -> dict[str, Any]:
    return {field.name: getattr(pack, field.name) for field in fields(pack)}
