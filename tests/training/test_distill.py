from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sora_fast.diffusion.flow_map import FlowPack
from sora_fast.diffusion.paths import DDPM
from sora_fast.packing import ConstantDrop
from sora_fast.training import checkpoint, distill
from sora_fast.training.config import write_config
from sora_fast.training.data.sources import DataConfig
from sora_fast.training.distill import TEACHER, Distiller, distilled_config, keep_teacher, new_distillation
from sora_fast.training.options import DistillOptions
from sora_fast.training.run import CHECKPOINTS, CONFIG, Distilled, RunConfig, read_run
from tests.training.test_trainer import Gradients, Trainer, _assert_same_run, _losses, tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    Trainer(tiny(steps=60, lr=3e-3), Gradients(), folder).fit(progress=False)
    return folder


def student(teacher: Path, **options: object) -> RunConfig:
    config = read_run(teacher)
    return distilled_config(config, replace(config.train, **{"steps": 8, **options}), Distilled(guidance=2.0))


def begun(teacher: Path, folder: Path, **options: object) -> Distiller:
    keep_teacher(teacher, folder)
    return Distiller(student(teacher, **options), Gradients(), folder)


def test_it_begins_as_the_teacher_and_ends_as_another(teacher: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()}
    distiller = begun(teacher, tmp_path / "run")
    (shown,) = distiller._taken(iter(distiller.batches))
    (pack,) = distiller._packs([shown])
    networks, lesson = distiller.networks, pack.lesson
    flow = FlowPack(pack.latents, pack.layout, networks.path, clean=pack.clean, patch_size=networks.patch_size)

    def said(model: torch.nn.Module, end: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            return flow.predict(model, lesson.x, lesson.level, end, prompts=pack.prompts)

    original = distiller._teacher.networks
    start = said(original, None)
    assert torch.equal(said(networks, lesson.level), start) and torch.equal(said(networks, lesson.end), start)
    distiller.fit(progress=False)
    assert torch.equal(said(original, None), start)
    assert not torch.allclose(said(networks, lesson.level), start, atol=1e-4)
    assert before == {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()}


def test_it_learns_guidance_and_the_way(teacher: Path, tmp_path: Path) -> None:
    begun(teacher, tmp_path / "run", steps=120, lr=1e-3).fit(progress=False)
    losses = [loss for _, loss, _ in _losses(tmp_path / "run")]
    assert sum(losses[-30:]) < 0.7 * sum(losses[:30])
    assert min(losses) > 0


def test_the_trajectory_is_the_guided_teacher_s(teacher: Path, tmp_path: Path) -> None:
    """Given frames have a guidance of their own and stay as they are."""
    config = student(teacher)
    keep_teacher(teacher, tmp_path / "run")
    scales = replace(config.distilled, guidance=3.0, guidance_given=1.0)
    distiller = Distiller(replace(config, distilled=scales), Gradients(), tmp_path / "run")
    for shown in distiller._taken(iter(distiller.batches)):
        # Twice for each step of the teacher's, which the log's MFU is to know of.
        assert distiller._meter._sums.flops == 2 * 8 * distiller._flops.batch(shown).forward
        networks, states = distiller._teacher.networks, shown.trajectory.states
        flow = FlowPack(shown.latents, shown.layout, networks.path, clean=shown.clean, patch_size=networks.patch_size)
        assert flow.given.any() and not flow.given.all()
        level, x = shown.trajectory.levels[-2], states[-2]
        with torch.no_grad():
            given = flow.predict(networks, x, level, None, prompts=shown.prompts)
            without = flow.predict(networks, x, level, None, prompts=distiller._teacher.null_prompts)
        guided = torch.where(flow.spread(flow.given.float()) > 0, given, without + 3 * (given - without))
        # The last step of the sampler is first order, and so ends in what was predicted.
        torch.testing.assert_close(states[-1], torch.where(flow.noisy, guided, flow.data.flat))


@pytest.mark.parametrize(("steps", "accumulate"), [(24, 1), (8, 3)])
def test_interrupted_then_resumed_to_the_bit(
    steps: int, accumulate: int, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trajectories that are no longer kept are not made again."""
    monkeypatch.setattr(distill, "LESSONS", 2)
    monkeypatch.setattr(distill, "KEPT", 2)
    one, other = tmp_path / "one", tmp_path / "other"
    config = student(teacher, steps=steps, accumulate=accumulate)
    for folder in (one, other):
        keep_teacher(teacher, folder)
    Distiller(config, Gradients(), one).fit(progress=False)
    stopped = Distiller(config, Gradients(interrupt_at=45), other)
    assert not stopped.fit(progress=False) and 3 < stopped.step < steps
    assert Distiller(config, Gradients(), other, resume=True).fit(progress=False)
    _assert_same_run(one, other)


def test_the_folder_needs_no_other(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    begun(teacher, folder).fit(progress=False)
    kept, saved = (checkpoint.latest(path) for path in (folder / TEACHER, teacher / CHECKPOINTS))
    assert kept.step == saved.step and kept.tensors.keys() == {"ema"}
    config = read_run(folder)
    assert config.distilled == Distilled(guidance=2.0) and config.model.sigma_end
    with pytest.raises(ValueError, match="already holds a run"):
        keep_teacher(teacher, folder)
    with pytest.raises(ValueError, match="distilled: changed"):
        changed = replace(config, distilled=Distilled(guidance=5.0))
        Distiller(changed, Gradients(), folder, resume=True)


def test_a_model_without_prompts(tmp_path: Path) -> None:
    plain = replace(tiny(), text=None, model=replace(tiny().model, text_dim=None, pooled_dim=None))
    Trainer(plain, Gradients(), tmp_path / "teacher").fit(progress=False)
    distiller = begun(tmp_path / "teacher", tmp_path / "run", steps=2)
    assert distiller._teacher.null_prompts is None and distiller.fit(progress=False)


def test_what_cannot_be_distilled_is_named(teacher: Path, tmp_path: Path) -> None:
    config = read_run(teacher)
    ddpm = replace(config, path=DDPM(), model=replace(config.model, discrete_time=True))
    with pytest.raises(ValueError, match="rectified flow"):
        distilled_config(ddpm, ddpm.train, Distilled())
    with pytest.raises(ValueError, match="spacing: 'even'; it must be one of trailing, late"):
        Distilled(spacing="even")
    with pytest.raises(ValueError, match="distilled already"):
        distilled_config(student(teacher), config.train, Distilled())
    with pytest.raises(ValueError, match="holds no run"):
        keep_teacher(tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match="no weights to begin with"):
        Distiller(student(teacher), Gradients(), tmp_path / "run")


def test_no_token_is_dropped_of_what_the_teacher_makes(teacher: Path, tmp_path: Path) -> None:
    config = read_run(teacher)
    batch = replace(config.train.batch, drop=ConstantDrop(0.5))
    folder = tmp_path / "run"
    folder.mkdir()
    dropping = replace(config, train=replace(config.train, batch=batch), data=DataConfig(str(tmp_path)))
    write_config(folder / CONFIG, dropping)
    new = new_distillation(DistillOptions(folder))
    assert new.train.batch == replace(batch, drop=None) and new.distilled.spacing == "late"
