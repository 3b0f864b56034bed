import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sora_fast.generation.engine import Engine
from sora_fast.generation.tasks import extend, text_to_video
from sora_fast.models.codecs import IdentityCodec
from sora_fast.training import codec
from sora_fast.training.codec import CodecConfig
from sora_fast.training.data.sources import Sample
from sora_fast.training.run import CONFIG, Networks, RunConfig, read_run
from sora_fast.training.runlog import read_log
from sora_fast.training.trainer import Trainer
from tests.models.codecs.means import Means
from tests.training.test_trainer import Gradients, tiny


@pytest.fixture(autouse=True)
def means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(codec.KINDS, "means", codec.Kind(lambda folder: Means(), lambda folder: "the same"))


def of_means(**options: object) -> RunConfig:
    config = tiny(**options)
    return replace(
        config, codec=CodecConfig("means", "/somewhere", "the same"), model=replace(config.model, patch_size=(1, 2, 2))
    )


class Broken(Gradients):
    """One sample is not finite."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return sample if index != 5 else Sample(sample.video / 0)


def test_the_configuration_chooses_the_codec_of_a_run(tmp_path: Path) -> None:
    """Of videos of any size; what is broken is named and left out; what is made has the size that was asked for."""
    trainer = Trainer(of_means(steps=6), Broken(), tmp_path / "run")
    trainer.fit(progress=False)
    assert read_run(tmp_path / "run") == of_means(steps=6)
    assert "values from" in trainer.batches.lost["sample 5"]
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["skipped"] == 1
    engine = Engine.load(tmp_path / "run", compile=False)
    assert isinstance(engine.networks.codec, Means)
    given = torch.linspace(-1, 1, 5).view(1, 5, 1, 1).expand(1, 5, 9, 7)
    video, longer = engine.generate([text_to_video("left", 7, (9, 7)), extend(given, "left", 3)], steps=2)
    assert video.shape == (1, 7, 9, 7) and longer.shape == (1, 8, 9, 7)
    means = given[:, 1:].mean(1, keepdim=True).expand(-1, 4, -1, -1)
    torch.testing.assert_close(longer[:, :5], torch.cat([given[:, :1], means], dim=1))


def test_runs_of_before_there_was_a_choice_have_the_pixels(tmp_path: Path) -> None:
    Trainer(tiny(steps=1), Gradients(), tmp_path / "run").fit(progress=False)
    path = tmp_path / "run" / CONFIG
    values = json.loads(path.read_text())
    del values["codec"]
    path.write_text(json.dumps(values))
    assert read_run(tmp_path / "run") == tiny(steps=1)
    assert Networks(read_run(tmp_path / "run")).codec == IdentityCodec(1)


def test_a_run_keeps_its_codec(tmp_path: Path) -> None:
    Trainer(tiny(steps=1), Gradients(), tmp_path / "run").fit(progress=False)
    with pytest.raises(ValueError, match="codec: changed since"):
        Trainer(
            replace(tiny(steps=2), codec=CodecConfig("means", "/somewhere", "the same")),
            Gradients(),
            tmp_path / "run",
            resume=True,
        )


def test_a_codec_that_does_not_fit_is_named() -> None:
    config = of_means()
    with pytest.raises(ValueError, match=r"model\.in_channels: 3; latents of this codec have 1"):
        Networks(replace(config, model=replace(config.model, in_channels=3)))
    with pytest.raises(ValueError, match=r"codec\.kind: 'other'; it must be one of pixels, vae, diffusers, means"):
        CodecConfig("other")
