import json
import math
from pathlib import Path

import pytest

from sora_fast.demo import run
from sora_fast.demo.digits import DigitsConfig
from sora_fast.demo.run import FULL, QUICK, Plan, run_config
from sora_fast.models.codecs import IdentityCodec
from sora_fast.packing import token_grid


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, whatever its cores."""
    monkeypatch.setattr(run, "WORKERS", 1)


def test_workers_are_launched_with_the_same_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that torchrun would take: `torchrun … -m sora_fast.cli demo …` is the same."""
    launched = []
    monkeypatch.setattr(run, "WORKERS", 2)
    monkeypatch.setattr(run, "launch", lambda *given: launched.append(given) or 130)
    assert run.main(["--quick", "--out", str(tmp_path)]) == 130
    assert launched == [(2, ["-m", "sora_fast.cli", "demo", "--quick", "--out", str(tmp_path)])]
    batches = [run_config(FULL, workers=workers).train.batch for workers in (1, 2)]
    assert batches[0].capacity == 2 * batches[1].capacity


def test_full_and_quick_differ_in_effort_only() -> None:
    full, quick = run_config(FULL), run_config(QUICK)
    assert full.model == quick.model and full.path == quick.path
    assert FULL.minutes > QUICK.minutes


def test_every_shape_of_the_source_fits_a_batch() -> None:
    config = run_config(FULL)
    codec = IdentityCodec.for_patches(1, config.model.patch_size)
    shapes = [codec.spec.latent_shape(*shape) for shape in DigitsConfig().shapes]
    assert max(math.prod(token_grid(shape, config.model.patch_size)) for shape in shapes) <= config.train.batch.capacity


@pytest.mark.slow
def test_the_whole_demo_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few steps of training, one of sampling: files and numbers are there, and say that it learned nothing."""
    monkeypatch.setattr(run, "QUICK", Plan(minutes=0.03, compile=False, continued=2, steps=1))
    out = tmp_path / "demo"
    assert run.main(["--quick", "--out", str(out)]) == 0
    for name in ("contact_sheet.png", "loss.png", "metrics.json"):
        assert (out / name).stat().st_size > 0
    assert len(list((out / "clips").glob("*.mp4"))) == len(list((out / "clips").glob("*.gif"))) > 10
    results = json.loads((out / "metrics.json").read_text())
    for group in ("seen", "unseen"):
        assert results[group]["clips"] == 40 * len(results[group]["by_shape"])
        assert results[group]["digit"]["right"] < 0.5, "an untrained model draws no digits"
        assert results[group]["ceiling"]["digit"]["right"] > 0.95
    assert results["image to video"]["given_frames_identical"] and results["extension"]["given_frames_identical"]
    assert results["training"]["steps"] > 0
    assert "digit, unseen shapes" in capsys.readouterr().out


def test_what_cannot_be_written_is_known_before_an_earlier_demo_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / run.MARK).touch()
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "clips").touch()
    monkeypatch.setattr(run, "train", lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(ValueError, match=r"nothing can be written to .*clips: Not a directory"):
        run.main(["--quick", "--out", str(tmp_path)])
    assert (tmp_path / "metrics.json").read_text() == "{}"


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_that_there_cannot_be_keep_an_earlier_demo(
    tmp_path: Path, minutes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / run.MARK).touch()
    (tmp_path / "metrics.json").touch()
    with pytest.raises(SystemExit):
        run.main(["--minutes", minutes, "--out", str(tmp_path)])
    assert f"'{minutes}' is not a positive number" in capsys.readouterr().err
    assert (tmp_path / "metrics.json").exists()


def test_numbers_are_written_before_pictures_and_an_error_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    results = {"score": 1}
    for name, made in {
        "train": True,
        "evaluate": (results, []),
        "training_record": {"seconds": 1.0},
        "summary": "the numbers",
    }.items():
        monkeypatch.setattr(run, name, lambda *_, made=made, **__: made)
    monkeypatch.setattr(run.Engine, "load", lambda *_: None)
    monkeypatch.setattr(run, "_draw", full)
    with pytest.raises(ValueError, match=f"No space left on device; the trained model is kept. .*--out {tmp_path}"):
        run.main(["--quick", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "metrics.json").read_text())["score"] == 1
    assert "the numbers" in capsys.readouterr().out
