"""What a new run is made with where nothing is said."""

from pathlib import Path

import pytest
import torch

from sora_fast.media import write_media
from sora_fast.training import beginning
from sora_fast.training.beginning import fitted, new_config
from sora_fast.training.data.sources import FolderSource
from sora_fast.training.options import TrainOptions
from sora_fast.training.run import Networks, RunConfig


@pytest.fixture(autouse=True)
def precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginning, "fitting_precision", lambda device: ("bfloat16", 9.0))


def config_of(folder: Path, device: str = "cpu", **options: object) -> RunConfig:
    o = TrainOptions(folder / "run", data=str(folder), **options)
    config = new_config(o, device)
    return fitted(config, o, FolderSource(config.data), device)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_media(tmp_path / "clip.mp4", torch.zeros(3, 5, 48, 64))
    return tmp_path


def test_sizes_suit_the_device(folder: Path) -> None:
    parameters = {
        device: sum(p.numel() for p in Networks(config_of(folder, device)).model.parameters())
        for device in ("cpu", "cuda")
    }
    assert parameters["cpu"] < 4e6 < 8e6 < parameters["cuda"]
    assert config_of(folder, "cpu").train.batch.capacity < config_of(folder, "cuda").train.batch.capacity


def test_what_is_said_goes_before_what_is_usual(folder: Path) -> None:
    config = config_of(folder, dim=64, depth=1, patch=(1, 4, 4), optimizer="adamw", precision="float32", ema_decay=0.0)
    assert (config.model.dim, config.model.depth, config.model.heads, config.model.patch_size) == (64, 1, 1, (1, 4, 4))
    assert (config.train.lr, config.train.precision, config.train.ema_decay) == (1e-3, "float32", 0.0)
    assert config_of(folder).train.precision == "bfloat16" and config_of(folder, lr=1e-5).train.lr == 1e-5


def test_a_file_longer_than_the_usual_batch_is_trained_on_all_the_same(folder: Path) -> None:
    write_media(folder / "long.mp4", torch.zeros(3, 70, 48, 64))
    assert config_of(folder, max_frames=70).train.batch.capacity == 70 * 6 * 8 > 2048
    # Of 9 frames of 6 x 8 tokens, five.
    assert config_of(folder, max_frames=9).train.batch.capacity == 5 * 9 * 6 * 8
    with pytest.raises(ValueError, match=r"long\.mp4 has 3360 tokens, more than a batch of --capacity 2048"):
        config_of(folder, max_frames=70, capacity=2048)


def test_positions_reach_as_far_as_the_files(folder: Path) -> None:
    assert config_of(folder).model.rope_theta == 100
    write_media(folder / "long.mp4", torch.zeros(3, 40, 48, 64))
    assert config_of(folder, max_frames=40).model.rope_theta == 10_000


def test_heads_are_as_many_as_the_width_takes(folder: Path) -> None:
    assert [config_of(folder, dim=dim).model.heads for dim in (16, 64, 256)] == [1, 1, 4]
    with pytest.raises(ValueError, match="--heads 3: it must divide --dim 64"):
        config_of(folder, dim=64, heads=3)
