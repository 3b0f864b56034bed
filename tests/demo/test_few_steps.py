import json
import math
from pathlib import Path

import pytest

from sora_fast.demo import few_steps
from sora_fast.demo.digits import DigitsConfig, MovingDigits
from sora_fast.demo.few_steps import few_steps_config
from sora_fast.demo.run import FULL, Plan, run_config
from sora_fast.training.run import read_run
from sora_fast.training.trainer import Trainer


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, whatever its cores."""
    monkeypatch.setattr(few_steps, "WORKERS", 1)


def test_the_guidance_of_the_demo_is_built_in() -> None:
    config = few_steps_config(run_config(FULL), minutes=1.0)
    assert (config.distilled.guidance, config.distilled.guidance_given) == (FULL.guidance, FULL.guidance_given)
    halves = few_steps_config(run_config(FULL), minutes=1.0, workers=2)
    assert config.train.batch.capacity == 2 * halves.train.batch.capacity
    largest = max(math.prod(shape) // 64 for shape in DigitsConfig().shapes if not any(side % 8 for side in shape[1:]))
    assert largest == 16 * 6 * 6 <= halves.train.batch.capacity


@pytest.mark.slow
def test_the_whole_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """An untrained model, hardly distilled and asked once: all figures are there, and none is good."""
    plan = Plan(minutes=0.01, compile=False, continued=2, steps=1)
    Trainer(run_config(plan), MovingDigits(seed=0), tmp_path / "run").fit(progress=False)
    monkeypatch.setattr(few_steps, "CALLS", (1,))
    monkeypatch.setattr(few_steps, "ROUNDS", 1)
    monkeypatch.setattr(few_steps, "FULL", plan)
    assert few_steps.main([str(tmp_path), "--minutes", "0.01"]) == 0
    results = json.loads((tmp_path / "few_steps" / "few_steps.json").read_text())
    assert results["scores"].keys() == {"teacher", "1 calls"}
    for scores in results["scores"].values():
        assert scores["seen"]["clips"] == scores["unseen"]["clips"] == 160
        assert scores["seen"]["digit"]["right"] < 0.5
        assert scores["extension"]["given_frames_identical"] and scores["image to video"]["given_frames_identical"]
    assert results["seconds"]["of one clip"]["teacher"] > 0
    assert read_run(tmp_path / "few_steps" / "run").distilled is not None
    assert "from teacher" in capsys.readouterr().out
    with pytest.raises(ValueError, match="already holds a run"):
        few_steps.main([str(tmp_path)])
