import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from sora_fast.diffusion import FlowMap, noise_like, sample
from sora_fast.generation.engine import SAMPLERS, Engine
from sora_fast.generation.tasks import Request, extend, image_to_video, join, pack_requests, text_to_video
from sora_fast.schedule import TileSchedule
from sora_fast.training.config import write_config
from sora_fast.training.distill import Distiller, distilled_config, keep_teacher
from sora_fast.training.run import CONFIG, Distilled, Networks, read_run
from tests.training.test_trainer import Gradients, Trainer, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt a little: to which side a clip brightens."""
    folder = tmp_path_factory.mktemp("engine") / "run"
    Trainer(tiny(steps=60, lr=3e-3), Gradients(), folder).fit(progress=False)
    return folder


@pytest.fixture(scope="module")
def engine(run: Path) -> Engine:
    return Engine.load(run)


def _ramp(frames: int, height: int = 8, width: int = 12) -> torch.Tensor:
    return torch.linspace(-1, 1, width).expand(1, frames, height, width)


def test_loads_the_averaged_weights(run: Path, engine: Engine) -> None:
    trained = Trainer(tiny(steps=60, lr=3e-3), Gradients(), run, resume=True)
    assert not engine.networks.trained()
    weights = dict(engine.networks.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in trained.average.tensors.items())


def test_mixed_requests_in_one_pack(engine: Engine) -> None:
    start, clip, end = _ramp(1), _ramp(2, 9, 13), _ramp(3, 9, 13) * 0.3
    requests = [
        text_to_video("left", 3, (10, 14), guidance=2.0),
        text_to_video("right", 1, (16, 8)),
        image_to_video(start, "right", 4, guidance=3.0),
        extend(clip, "right", 3),
        extend(clip, "right", 3, backward=True),
        join(clip, end, "right", 2),
    ]
    seen: list[tuple[int, int]] = []
    videos = engine.generate(requests, steps=3, progress=lambda done, steps: seen.append((done, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for request, video in zip(requests, videos, strict=True):
        assert video.shape == (1, request.frames, request.height, request.width)
        assert video.isfinite().all()
        assert video.abs().max() <= 1
    assert torch.equal(videos[2][:, :1], start)
    assert torch.equal(videos[3][:, :2], clip)
    assert torch.equal(videos[4][:, -2:], clip)
    assert torch.equal(videos[5][:, :2], clip)
    assert torch.equal(videos[5][:, -3:], end)


def test_a_video_does_not_depend_on_its_neighbours(engine: Engine) -> None:
    request = text_to_video("left", 3, (10, 14), guidance=2.0, seed=7)
    other = text_to_video("right", 2, (16, 16), seed=8)
    (alone,) = engine.generate([request], steps=3)
    _, packed = engine.generate([other, request], steps=3)
    torch.testing.assert_close(alone, packed, rtol=0, atol=1e-5)
    (another,) = engine.generate([text_to_video("left", 3, (10, 14), guidance=2.0, seed=9)], steps=3)
    assert not torch.allclose(alone, another, atol=1e-2)


def test_guidance_is_each_request_s_own(engine: Engine) -> None:
    plain, guided = Request("left", 2, 8, 8), Request("left", 2, 8, 8, guidance=5.0)
    (alone,) = engine.generate([plain], steps=3)
    beside, stronger = engine.generate([plain, guided], steps=3)
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)
    assert (stronger - beside).abs().max() > 1e-2
    (other,) = engine.generate([Request("right", 2, 8, 8)], steps=3)
    assert (other - alone).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("dropout", "text", "asked", "said"),
    [
        (0.1, True, {"prompt": "left", "guidance": 3.0}, None),
        (0.0, True, {"prompt": "left", "guidance": 1.0}, None),
        (0.0, True, {"prompt": "left", "guidance": 3.0}, "with a caption dropout of 0"),
        (0.1, False, {"prompt": "", "guidance": 1.0}, None),
        (0.1, False, {"prompt": "left", "guidance": 1.0}, "prompts and guidance are not used"),
        (0.0, False, {"prompt": "", "guidance": 3.0}, "prompts and guidance are not used"),
    ],
)
def test_what_a_run_was_not_trained_for_is_said_once(
    dropout: float, text: bool, asked: dict, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny()
    batch = replace(config.train.batch, caption_dropout=dropout)
    config = replace(config, train=replace(config.train, batch=batch))
    if not text:
        model = replace(config.model, text_dim=None, pooled_dim=None)
        config = replace(config, model=model, text=None)
    engine = Engine(Networks(config))
    for _ in range(2):
        engine.generate([Request(frames=1, height=8, width=8, **asked)], steps=1)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (said is not None) and all(said in message for message in messages)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_schedules_are_built_once_a_request(guidance: float, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    built, build = [], TileSchedule.build
    monkeypatch.setattr(TileSchedule, "build", lambda *args, **options: built.append(args) or build(*args, **options))
    engine.generate([Request("left", 2, 8, 8, guidance=guidance)], steps=4)
    assert len(built) == 2  # the tokens', and their text's


def test_weights_of_another_model_are_refused(run: Path, tmp_path: Path) -> None:
    """Not spread over whatever they happen to fit."""
    shutil.copytree(run, tmp_path / "run")
    config = read_run(run)
    write_config(tmp_path / "run" / CONFIG, replace(config, model=replace(config.model, depth=config.model.depth + 1)))
    with pytest.raises(ValueError, match=r"not of the model that its config\.json describes: model\.blocks"):
        Engine.load(tmp_path / "run")


@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "dpm++"])
def test_samplers(engine: Engine, name: str) -> None:
    (video,) = engine.generate([Request("left", 2, 8, 8)], steps=2, sampler=SAMPLERS[name])
    assert video.isfinite().all()


def test_errors(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        Engine.load(tmp_path)
    Trainer(tiny(), Gradients(), tmp_path / "untrained")
    with pytest.raises(ValueError, match="no checkpoint yet"):
        Engine.load(tmp_path / "untrained")
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"steps: {steps}; it must be at least 1"):
            engine.generate([Request("", 1, 8, 8)], steps=steps)
    with pytest.raises(ValueError, match="guidance: nan; it must be finite"):
        Request("", 1, 8, 8, guidance=float("nan"))
    with pytest.raises(TypeError, match="needs a DDPM path"):
        engine.generate([Request("", 1, 8, 8)], sampler=SAMPLERS["ddpm"])


@pytest.fixture(scope="module")
def distilled(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("distilled") / "run"
    keep_teacher(run, folder)
    config = read_run(run)
    config = distilled_config(config, replace(config.train, steps=6), Distilled(steps=2, guidance=4.0, spacing="late"))
    Distiller(config, Gradients(), folder).fit(progress=False)
    return Engine.load(folder)


def test_a_distilled_run_says_its_steps_and_has_its_guidance(distilled: Engine, caplog) -> None:
    seen: list[tuple[int, int]] = []
    request = text_to_video("left", 3, (10, 14), guidance=2.0)
    (guided,) = distilled.generate([request], progress=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)] and distilled.latency.calls == 2
    distilled.generate([request])
    assert caplog.text.count("with a guidance of 4 in its weights") == 1
    caplog.clear()
    (plain,) = distilled.generate([replace(request, guidance=1.0)])
    assert torch.equal(guided, plain) and not caplog.text


def test_a_distilled_run_is_told_where_each_step_leads(distilled: Engine, caplog) -> None:
    """Of requests of several step counts, in one pack, as alone; not so where the sampler does not say."""
    requests = [replace(text_to_video("left", 3, (10, 14), seed=3), steps=count) for count in (2, 4)]
    together = distilled.generate(requests)
    for request, video in zip(requests, together, strict=True):
        (alone,) = distilled.generate([request])
        torch.testing.assert_close(alone, video, rtol=0, atol=1e-5)
        reference = _by_sample(distilled, request)
        torch.testing.assert_close(video, reference, rtol=0, atol=1e-5)
    (named,) = distilled.generate(requests[:1], sampler=SAMPLERS["flow-map"])
    torch.testing.assert_close(named, together[0], rtol=0, atol=1e-5)
    assert not caplog.text
    (euler,) = distilled.generate(requests[:1], sampler=SAMPLERS["euler"])
    assert (euler - together[0]).abs().max() > 1e-3
    assert "no sampler but its own (flow-map)" in caplog.text


def _by_sample(engine: Engine, request: Request) -> torch.Tensor:
    """`sample` on the model itself, which shares nothing with the engine but the sampler."""
    networks = engine.networks
    packed = pack_requests([request], codec=networks.codec, patch_size=networks.patch_size)
    text = networks.text(*networks.text.tokenize([request.prompt]))
    noise = packed.data.with_flat(noise_like(packed.data, torch.Generator().manual_seed(request.seed)))
    made = sample(
        partial(networks.model, text=text),
        noise,
        packed.layout,
        networks.path,
        FlowMap("late"),
        steps=request.steps,
        patch_size=networks.patch_size,
    )
    return networks.codec.decode(made.to_list()[0])


def test_a_distilled_run_keeps_given_frames(distilled: Engine) -> None:
    start, clip = _ramp(1), _ramp(2, 9, 13)
    video, longer = distilled.generate([image_to_video(start, "right", 4), extend(clip, "right", 3, backward=True)])
    assert torch.equal(video[:, :1], start) and torch.equal(longer[:, -2:], clip)
    assert video.isfinite().all() and longer.isfinite().all()


def test_a_flow_map_needs_a_distilled_run(engine: Engine) -> None:
    with pytest.raises(ValueError, match="needs a distilled run"):
        engine.generate([text_to_video("left", 1, (8, 8))], sampler=SAMPLERS["flow-map"])


def test_deterministic_means_alone_as_packed_to_the_bit(engine: Engine) -> None:
    requests = [text_to_video("left", 3, (10, 14), guidance=2.0, seed=7), text_to_video("right", 1, (8, 8), seed=8)]
    torch.use_deterministic_algorithms(True)
    try:
        packed = engine.generate(requests, steps=3)
        alone = [engine.generate([request], steps=3)[0] for request in requests]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(packed, alone, strict=True))


def test_it_says_where_the_time_went(engine: Engine) -> None:
    engine.generate([text_to_video("left", 3, (10, 14), guidance=2.0)], steps=3)
    latency = engine.latency
    assert len(latency.steps) == latency.calls == 3 and latency.tokens == 3 * 2 * 3 * 3 * 4
    assert 0 < latency.network < sum(latency.steps) and 0 < latency.outside < 1
    assert "first step" in str(latency) and "outside the network" in str(latency)
