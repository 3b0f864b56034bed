from pathlib import Path

import pytest

from sora_fast.packing import BetaDrop, ConstantDrop, ResolutionDrop, SigmoidDrop
from sora_fast.packing.dropping import DropRule
from sora_fast.training.config import read_config, write_config
from sora_fast.training.data.batch import BatchConfig
from sora_fast.training.dropping import drop_rule


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("0.5", ConstantDrop(0.5)),
        ("beta:.4", BetaDrop(0.4, max_rate=0.85)),
        ("resolution:0.2-0.6", ResolutionDrop(0.2, 0.6, min_tokens=4, max_tokens=90)),
        ("decreasing:0.8-0.2", SigmoidDrop(100, 0.8, 0.2)),
    ],
)
def test_rules(text: str, rule: DropRule, tmp_path: Path) -> None:
    assert drop_rule(text, steps=100, tokens=[90, 4, 20]) == rule
    write_config(tmp_path / "config.json", BatchConfig(drop=rule))
    assert read_config(tmp_path / "config.json", BatchConfig).drop == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half", "must be like 0.5, beta:0.5"),
        ("1.5", "must be like"),
        ("beta:0.9", "--drop beta:0.9: mean must not exceed max_rate"),
        ("constant:0.2", "be like"),
        ("decreasing:0.8-0.2", "does not know how far it is; give it --steps"),
        ("resolution:0.2-0.6", "all samples have 7 tokens"),
    ],
)
def test_what_cannot_be_asked_for(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drop_rule(text, steps=None, tokens=[7, 7])
