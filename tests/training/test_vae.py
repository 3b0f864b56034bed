from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_fast.generation.engine import Engine
from sora_fast.generation.tasks import image_to_video, text_to_video
from sora_fast.models.codecs.vae import VAECodec
from sora_fast.models.video_vae import VAEConfig
from sora_fast.training.codec import CodecConfig
from sora_fast.training.data.crops import CropConfig
from sora_fast.training.run import CHECKPOINTS, RunConfig, read_run
from sora_fast.training.trainer import Trainer
from sora_fast.training.vae import VAEFlops, VAETrainer
from sora_fast.training.vae_beginning import train_config
from sora_fast.training.vae_run import VAERunConfig, fingerprint, load_vae
from tests.training.test_trainer import Gradients, _assert_same_run, _losses, tiny

CROPS = CropConfig(max_frames=5, min_side=4)
MODEL = VAEConfig(1, 2, widths=(4, 6, 8), blocks=(1, 1, 1))


def config(**options: object) -> VAERunConfig:
    train = train_config(replace(CROPS, max_side=16), capacity=64, **{"steps": 12, "save_every": 4, **options})
    # Planned so far ahead that a step is taken before the sample that Ctrl-C comes with.
    return VAERunConfig(MODEL, replace(train, batch=replace(train.batch, look_ahead=12)), crops=CROPS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "run"
    assert VAETrainer(config(), Gradients(), folder).fit(progress=False)
    return folder


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "run"
    VAETrainer(config(steps=60, warmup=5, lr=1e-2), Gradients(), folder).fit(progress=False)
    return folder


def test_it_learns_and_its_latents_are_normalised(learned: Path) -> None:
    losses = [loss for _, loss, _ in _losses(learned)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    codec, videos = load_vae(learned), [Gradients()[index].video for index in range(60)]
    decoded = [codec.decode(codec.encode(video), tuple(video.shape[1:])) for video in videos]
    error = np.mean([(a - b).square().mean().item() for a, b in zip(videos, decoded, strict=True)])
    assert error < 0.5 * np.mean([video.square().mean().item() for video in videos])
    codes = torch.cat([latents.flatten(1) for latents in codec.encode_all(videos)], dim=1)
    assert codes.mean(1).abs().max() < 0.5 and 0.5 < codes.std(1).min() <= codes.std(1).max() < 2


def test_stopped_and_resumed_it_is_the_same_to_the_bit(whole: Path, tmp_path: Path) -> None:
    """The latents' mean and deviation, which a checkpoint holds too."""
    folder = tmp_path / "run"
    stopped = VAETrainer(config(), Gradients(interrupt_at=40), folder)
    assert not stopped.fit(progress=False) and 0 < stopped.step < 12
    assert VAETrainer(config(), Gradients(), folder, resume=True).fit(progress=False)
    _assert_same_run(whole, folder)
    assert read_run(whole, VAERunConfig) == config()
    with pytest.raises(ValueError, match="kl: changed since"):
        VAETrainer(replace(config(), kl=1.0), Gradients(), folder, resume=True)


def test_a_step_that_is_not_finite_leaves_the_latents_as_they_were(tmp_path: Path) -> None:
    trainer = VAETrainer(config(), Gradients(), tmp_path / "run")
    (pack,) = trainer._packs([next(iter(trainer.batches))])
    trainer.loss(pack)
    before = trainer.loss.mean.clone()
    assert before.abs().max() > 0
    pack.groups[0].frames[0] = float("nan")
    assert not trainer.loss(pack)[0].isfinite()
    assert torch.equal(trainer.loss.mean, before)


def test_copies_of_the_first_frame_do_not_count(tmp_path: Path) -> None:
    trainer = VAETrainer(config(), Gradients(), tmp_path / "run")
    (pack,) = trainer._packs([next(iter(trainer.batches))])
    for group in pack.groups:
        assert (~group.counts).sum() == 3 * len(group.lengths) and len(group.frames) == 4 * sum(group.lengths)
        start = 0
        for length in group.lengths:
            assert group.counts[start : start + 4].tolist() == [False] * 3 + [True]
            assert (group.frames[start : start + 4] == group.frames[start]).all()
            start += 4 * length


def latent_run(vae: Path, **options: object) -> RunConfig:
    base = tiny(**options)
    model = replace(base.model, in_channels=2, patch_size=(1, 2, 2))
    return replace(base, model=model, codec=CodecConfig("vae", str(vae)))


def test_a_model_of_its_latents(learned: Path, tmp_path: Path) -> None:
    Trainer(latent_run(learned, steps=2), Gradients(), tmp_path / "run").fit(progress=False)
    kept = read_run(tmp_path / "run").codec
    assert kept == CodecConfig("vae", str(learned), fingerprint(learned))
    engine = Engine.load(tmp_path / "run", compile=False)
    assert isinstance(engine.networks.codec, VAECodec)
    given = Gradients()[0].video
    _, _, height, width = given.shape
    video, moving = engine.generate([text_to_video("left", 6, (9, 14)), image_to_video(given, "left", 5)], steps=2)
    assert video.shape == (1, 6, 9, 14) and moving.shape == (1, 5, height, width)
    assert video.isfinite().all() and video.abs().max() <= 1
    codec = engine.networks.codec
    torch.testing.assert_close(moving[:, :1], codec.decode(codec.encode(given), (1, height, width)), atol=1e-5, rtol=0)


def test_another_codec_in_its_folder_is_named(tmp_path: Path) -> None:
    vae, run = tmp_path / "vae", tmp_path / "run"
    VAETrainer(config(steps=2), Gradients(), vae).fit(progress=False)
    Trainer(latent_run(vae, steps=1), Gradients(), run).fit(progress=False)
    moved = vae.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="holds no run"):
        Engine.load(run)
    assert Engine.load(run, codec=moved, compile=False).networks.codec.spec.channels == 2
    VAETrainer(config(steps=3), Gradients(), moved, resume=True).fit(progress=False)
    with pytest.raises(ValueError, match=r"holds another codec .* or that one, trained further; say where it is now"):
        Engine.load(run, codec=moved)
    with pytest.raises(ValueError, match=r"model\.in_channels: 1; latents of this codec have 2"):
        replace(tiny(), codec=CodecConfig("vae", str(moved))).build_codec()
    with pytest.raises(ValueError, match="is not a valid VAERunConfig"):
        load_vae(run)
    with pytest.raises(ValueError, match="is not a valid RunConfig"):
        Engine.load(moved)


def test_what_it_cannot_be_trained_with_is_named() -> None:
    with pytest.raises(ValueError, match=r"crops\.stride: 4; it must be 8"):
        replace(config(), model=VAEConfig(spatial_stride=8))
    with pytest.raises(ValueError, match="compile, graph and recompute are not for an autoencoder"):
        replace(config(), train=replace(config().train, compile="inductor"))
    with pytest.raises(ValueError, match=r"kl: -1\.0; it must not be negative"):
        replace(config(), kl=-1.0)
    with pytest.raises(ValueError, match="--capacity 4: a crop has up to 32 latent pixels"):
        train_config(replace(CROPS, max_side=16), capacity=4, steps=1)


def test_counted_products() -> None:
    """Of the two ends, of which one knows how many there are; all else costs too."""
    each = VAEFlops(MODEL).each
    fine = 4 * 4  # pixels of half the size, in four frames
    ends = fine * 9 * (4 * 4 + 4 * 4) + 9 * (8 * 4 + 2 * 8)
    blocks = 2 * 27 * (fine * 4**2 + 2 * 6**2 + 8**2)
    between = 2 * (2 * (2 * 4 * 4 * 6) + 2 * 6 * 8)
    assert each == 2 * (ends + blocks + between)


def test_checkpoints_hold_the_latents(whole: Path) -> None:
    newest = max((whole / CHECKPOINTS).iterdir())
    assert (newest / "latents.safetensors").exists()
