import json
import math
from pathlib import Path

import pytest

from sora_fast.demo import run
from sora_fast.demo.digits import DigitsConfig
from sora_fast.demo.run import FULL, QUICK, Plan, run_config
from sora_fast.models.codecs import IdentityCodec
from sora_fast.training.batches import token_grid


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
