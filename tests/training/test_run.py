import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sora_fast.diffusion.paths import DDPM, RectifiedFlow
from sora_fast.masks import SpacetimeMask
from sora_fast.models import SoraDiTConfig
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.training.data.batches import BatchConfig, Prompts
from sora_fast.training.data.sources import DataConfig
from sora_fast.training.run import (
    CONFIG,
    Networks,
    RunConfig,
    TextConfig,
    TrainConfig,
    check_resumable,
    create_run,
    moved,
    read_run,
    update_run,
)

MODEL = SoraDiTConfig(dim=32, depth=1, heads=2, in_channels=1, patch_size=(2, 4, 4), text_dim=16, pooled_dim=16)
CONFIG_OF_ALL_SORTS = RunConfig(
    model=replace(MODEL, mask=SpacetimeMask.window(1, 2, None, causal=True), discrete_time=True, learned_sigma=True),
    train=TrainConfig(minutes=0.1 + 0.2, batch=BatchConfig(capacity=77, oversized="skip"), betas=(0.8, 0.99)),
    text=TextConfig(dim=16, layers=1),
    path=DDPM(learned_variance=True),
    data=DataConfig("/clips/with spaces and ü", max_frames=None, fps=12.5),
    fps=12.5,
)
SIMPLE = RunConfig(model=MODEL, train=TrainConfig(steps=3), text=TextConfig(dim=16, layers=1))


@pytest.mark.parametrize("config", [SIMPLE, CONFIG_OF_ALL_SORTS, replace(SIMPLE, path=RectifiedFlow(base_tokens=8))])
def test_a_run_remembers_its_configuration(tmp_path: Path, config: RunConfig) -> None:
    create_run(tmp_path / "deep" / "run", config)
    assert read_run(tmp_path / "deep" / "run") == config
    with pytest.raises(ValueError, match="already holds a run"):
        create_run(tmp_path / "deep" / "run", config)


def test_how_a_run_is_trained_may_change_and_what_it_is_may_not(tmp_path: Path) -> None:
    create_run(tmp_path, SIMPLE)
    check_resumable(tmp_path, SIMPLE)
    check_resumable(tmp_path, replace(SIMPLE, train=TrainConfig(minutes=1, lr=1e-5, save_every=7, compile=None), fps=3))
    for name, value in {"model": replace(MODEL, depth=2), "data": DataConfig("clips"), "text": None}.items():
        with pytest.raises(ValueError, match=f"^{name}: changed since"):
            check_resumable(tmp_path, replace(SIMPLE, **{name: value}))
    with pytest.raises(ValueError, match=r"^optimizer, seed: changed since"):
        check_resumable(tmp_path, replace(SIMPLE, train=TrainConfig(steps=3, optimizer="muon", seed=4)))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is looked at of a text encoder's folder until it is loaded."""
    folder = tmp_path_factory.mktemp("text") / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "clip_text_model"}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    return folder


def _with_folders(data: Path | str, text: Path | str) -> RunConfig:
    return replace(SIMPLE, data=DataConfig(str(data)), text=TextConfig(folder=str(text)))


def test_a_run_finds_its_folders_from_anywhere(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(encoder.parent)
    create_run(tmp_path / "run", _with_folders("clips", encoder.name))
    monkeypatch.chdir(tmp_path)
    config = read_run(tmp_path / "run")
    assert (config.data.folder, config.text.folder) == (str(encoder.parent / "clips"), str(encoder))
    assert config.text.located() == config.text
    check_resumable(tmp_path / "run", config)
    # As a program of one's own would say it again.
    monkeypatch.chdir(encoder.parent)
    again = _with_folders("clips", encoder.name)
    check_resumable(tmp_path / "run", again)
    update_run(tmp_path / "run", again)
    assert read_run(tmp_path / "run") == config


def test_folders_may_move_if_they_hold_the_same(encoder: Path, tmp_path: Path) -> None:
    run, here = tmp_path / "run", tmp_path / "here"
    shutil.copytree(encoder, here)
    create_run(run, _with_folders(tmp_path / "clips", here))
    here.rename(tmp_path / "there")
    config = read_run(run)
    with pytest.raises(ValueError, match=r"here is not there; .* say where \(--text-encoder FOLDER\)"):
        check_resumable(run, config)
    config = moved(config, data=tmp_path / "elsewhere", text_encoder=tmp_path / "there")
    check_resumable(run, config)
    update_run(run, config)
    assert read_run(run).data.folder == str(tmp_path / "elsewhere")
    assert read_run(run).text.folder == str(tmp_path / "there")

    (tmp_path / "there" / "model.safetensors").write_bytes(bytes(256))
    for same in (config, replace(config, text=replace(config.text, fingerprint=None))):
        with pytest.raises(ValueError, match="there holds another text encoder"):
            check_resumable(run, same)
    with pytest.raises(ValueError, match="there holds another text encoder"):
        config.text.build()
    with pytest.raises(ValueError, match=r"^text: changed since"):
        check_resumable(run, replace(config, text=TextConfig()))


def test_old_runs_get_a_fingerprint_when_they_go_on(
    encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    create_run(tmp_path, _with_folders(tmp_path, encoder))
    values = asdict(read_run(tmp_path))
    assert values["text"].pop("fingerprint")
    values["text"]["folder"] = os.path.relpath(encoder)
    (tmp_path / CONFIG).write_text(json.dumps(values))
    config = read_run(tmp_path)
    assert config.text.fingerprint is None
    moved(config, text_encoder="there")
    assert caplog.messages == ["whether there is the text encoder that the run was begun with was not recorded"]
    check_resumable(tmp_path, config)
    update_run(tmp_path, config)
    assert read_run(tmp_path).text == TextConfig(folder=str(encoder)).located()


def test_paths_need_not_be_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 \xc3\xa9")
    create_run(folder, replace(SIMPLE, data=DataConfig(str(folder))))
    assert os.fsencode(read_run(folder).data.folder) == os.fsencode(folder)
    assert "é" in (folder / CONFIG).read_text()


def test_what_a_run_never_had_cannot_move() -> None:
    with pytest.raises(ValueError, match="data: clips; the run was trained on a source made in Python"):
        moved(SIMPLE, data="clips")
    with pytest.raises(ValueError, match="text_encoder: t5; the run has no text encoder from a folder"):
        moved(SIMPLE, text_encoder="t5")
    assert moved(SIMPLE) == SIMPLE


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        read_run(tmp_path)
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="not a valid RunConfig"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 1.0}, "exactly one"),
        ({"steps": None}, "exactly one"),
        ({"steps": 0}, "steps: 0; it must be positive"),
        ({"lr": -1.0}, "lr: -1.0; it must be positive"),
        ({"precision": "int8"}, "precision"),
    ],
)
def test_configuration_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 12, **options})  # type: ignore[arg-type]


def test_path_and_model_must_agree() -> None:
    with pytest.raises(ValueError, match="discrete_time: False; it must be True"):
        replace(SIMPLE, path=DDPM())
    with pytest.raises(ValueError, match="learned_sigma: False; it must be True"):
        replace(SIMPLE, model=replace(MODEL, discrete_time=True), path=DDPM(learned_variance=True))


def test_networks_hand_the_encoded_prompts_to_the_model() -> None:
    torch.manual_seed(0)
    networks = Networks(SIMPLE)
    for parameter in networks.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    latents = RaggedLatents.from_list([torch.randn(1, 2, 4, 8), torch.randn(1, 4, 4, 4)])
    layout = PackedLayout.from_grids([(1, 1, 2), (2, 1, 1)])
    conditioning = Conditioning.per_segment(torch.tensor([0.3, 0.6]), layout)
    ids, text_layout = networks.text.tokenize(["one", "another"])
    made = networks(latents, layout, conditioning, Prompts(ids, text_layout))
    expected = networks.model(latents, layout, conditioning, text=networks.text(ids, text_layout))
    assert torch.equal(made.flat, expected.flat)
    other = networks(latents, layout, conditioning, Prompts(*networks.text.tokenize(["one", "an other"])))
    first, second = ((a - b).abs().max() for a, b in zip(made.to_list(), other.to_list(), strict=True))
    assert first < 1e-5 < second


def test_networks_train_what_is_not_frozen_and_keep_the_first_frame_apart() -> None:
    networks = Networks(SIMPLE)
    assert networks.codec.spec.lead == 1
    assert networks.trained().keys() == dict(networks.named_parameters()).keys()
    networks.text.requires_grad_(False)
    assert networks.trained().keys() == {f"model.{name}" for name, _ in networks.model.named_parameters()}


def test_width_of_the_text(tmp_path: Path) -> None:
    assert TextConfig(dim=24).width == TextConfig(dim=24).build().dim == 24
    with pytest.raises(ValueError, match=r"no config\.json"):
        _ = TextConfig(folder=str(tmp_path)).width
