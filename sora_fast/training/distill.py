"""Distillation: a trained run's model becomes a flow map, which makes a video in a few calls without guidance.

The new run has a folder of its own, as `train` makes one, and in its RUN/teacher the weights that it began with.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_fast.diffusion.flow_map import Interval, NoisyPack, flow_map_loss, split_target
from sora_fast.files import check_folder
from sora_fast.packing import PackedLayout, RaggedLatents
from sora_fast.training import checkpoint
from sora_fast.training.batches import Batch, Prompts
from sora_fast.training.data import Source
from sora_fast.training.options import DISTILL_CHANGEABLE, DistillOptions, spelled
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
from sora_fast.training.trainer import Trainer, compile_blocks

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
    ) -> None:
        saved = checkpoint.latest(Path(folder) / TEACHER)
        if saved is None:
            raise ValueError(f"{Path(folder) / TEACHER}: no weights to begin with are there")
        super().__init__(config, source, folder, device=device, resume=resume)
        plain = replace(config, model=replace(config.model, sigma_end=False), distilled=None)
        self.teacher = self._twin(plain, saved.tensors["ema"])
        if self.step == 0:
            self._begin(saved.tensors["ema"])
        self.slow = self._twin(config, self.average.tensors)
        self.null_prompts = self._null_prompts()

    @torch.no_grad()
    def _begin(self, weights: dict[str, Tensor]) -> None:
        """With the teacher's weights; those of the second level, which it has not, start as they are."""
        for name, value in weights.items():
            self.parameters[name].copy_(value)
        self.average.load({name: p.detach() for name, p in self.parameters.items()})

    def _twin(self, config: RunConfig, weights: dict[str, Tensor]) -> Networks:
        """Networks that share the memory of `weights`, if they are on the device, and a frozen text encoder."""
        text = self.networks.text
        twin = Networks(replace(config, text=None))
        trained = text is not None and any(p.requires_grad for p in text.parameters())
        twin.text = copy.deepcopy(text) if trained else text
        twin = twin.to(self.device)
        for name, parameter in twin.trained().items():
            parameter.data = weights[name].to(self.device)
        if self.compiles:
            compile_blocks(twin.model, self.config.compile)
        return twin.requires_grad_(False)

    def _null_prompts(self) -> Prompts | None:
        """What guidance leads away from; None if the teacher is asked once, without."""
        d, batch = self.networks.config.distilled, self.config.batch
        if self.networks.text is None or d.guidance == d.guidance_given == 1:
            return None
        ids, layout = self.networks.text.tokenize(
            [""] * batch.max_segments, capacity=batch.text_capacity, max_segments=batch.max_segments
        )
        return Prompts(ids, layout).to(self.device)

    def _draw(self, batch: Batch) -> tuple[Any, ...]:
        """Noise and clean tokens, as in every training, and the interval of a jump."""
        _, noise, clean = super()._draw(batch)
        return noise, clean, Interval.draw(self.networks.path, batch.layout, self.generator)

    def _loss(
        self,
        latents: RaggedLatents,
        layout: PackedLayout,
        prompts: Prompts | None,
        noise: Tensor,
        clean: Tensor,
        interval: Interval,
    ) -> tuple[Tensor, Tensor]:
        networks, half = self.networks, self.config.precision == "bfloat16"
        pack = NoisyPack(latents, layout, networks.path, clean=clean, patch_size=networks.patch_size)
        from_teacher = (self.step + self.world.rank) % 2 == 0
        level, end = (interval.taught, interval.taught) if from_teacher else (interval.level, interval.end)
        x = pack.at(noise, level)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            with torch.no_grad():
                if from_teacher:
                    target = self._guided(pack, x, level, prompts)
                else:
                    target = split_target(pack, self.slow, x, interval, prompts=prompts)
            return flow_map_loss(pack, pack.predict(networks, x, level, end, prompts=prompts), target, level)

    def _guided(self, pack: NoisyPack, x: Tensor, sigma: Tensor, prompts: Prompts | None) -> Tensor:
        """The teacher's clean data [P] at levels [S]."""
        given = pack.predict(self.teacher, x, sigma, None, prompts=prompts)
        if self.null_prompts is None:
            return given
        without = pack.predict(self.teacher, x, sigma, None, prompts=self.null_prompts)
        d = self.networks.config.distilled
        return torch.lerp(without, given, pack.spread(torch.where(pack.given, d.guidance_given, d.guidance)))
