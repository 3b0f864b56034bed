import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks._checkout import ROOT
from benchmarks.timing import Timing
from benchmarks.tune import Trial, Winner, one_pass_up_to, rewrite, winners
from sora_fast.kernels._attention_config import BlockSizes

SOURCE = (ROOT / "kernels" / "_attention_config.py").read_text()
OLD, NEW = BlockSizes(128, 64, 8, 3), BlockSizes(64, 64, 4, 3)
FAST, SLOW, CLOSE = (Timing(middle, middle - 0.1, middle + 0.1, 9) for middle in (1.0, 2.0, 1.1))


def _block_sizes(source: str, kernel: str, head_dim: int, major: int) -> BlockSizes:
    module: dict[str, Any] = {"__name__": "sora_fast.kernels.rewritten"}
    exec(compile(source, "rewritten", "exec", dont_inherit=True), module)
    found = module["block_sizes"](kernel, torch.bfloat16, head_dim, (major, 0))
    return BlockSizes(found.own, found.other, found.num_warps, found.num_stages)


def test_the_fastest_wins_and_says_why() -> None:
    trials = [Trial("forward", 128, OLD, SLOW), Trial("forward", 128, NEW, FAST)]
    assert list(winners(trials)) == [Winner("forward", 128, NEW, "64×64 w4 s3, 2.00× as fast as 128×64 w8 s3")]


@pytest.mark.parametrize(
    "trials",
    [
        pytest.param([Trial("forward", 128, OLD, FAST), Trial("forward", 128, NEW, SLOW)], id="slower"),
        pytest.param([Trial("forward", 128, OLD, CLOSE), Trial("forward", 128, NEW, FAST)], id="within the noise"),
        pytest.param(
            [Trial("forward", 128, OLD, FAST), Trial("forward", 128, NEW, absent="spills")], id="does not run"
        ),
    ],
)
def test_otherwise_nothing_changes(trials: list[Trial]) -> None:
    assert not list(winners(trials))


def test_what_does_not_run_loses_to_anything() -> None:
    trials = [Trial("forward", 128, OLD, absent="too large"), Trial("forward", 128, NEW, SLOW)]
    assert [winner.blocks for winner in winners(trials)] == [NEW]


def test_one_pass_is_taken_where_it_wins_without_a_gap() -> None:
    def trials(head_dim: int, one: Timing, two: Timing) -> list[Trial]:
        return [Trial("one_pass", head_dim, OLD, one), Trial("grad_query", head_dim, OLD, two)]

    wins, loses = trials(64, FAST, SLOW), trials(80, SLOW, FAST)
    assert one_pass_up_to(wins) == 64
    assert one_pass_up_to([*wins, *loses, *trials(128, FAST, SLOW)]) == 64
    assert one_pass_up_to(loses) == one_pass_up_to([]) == 0


@pytest.mark.parametrize("kernel", ["forward", "grad_query", "grad_key_value", "one_pass"])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_only_the_winners_head_dim_changes(kernel: str, head_dim: int) -> None:
    text = rewrite(SOURCE, [Winner(kernel, head_dim, BlockSizes(32, 64, 4, 5), "why")], 9, where="some GPU 2026-01-01")
    for other in tune._ALL_HEAD_DIMS:
        expected = BlockSizes(32, 64, 4, 5) if other == head_dim else _block_sizes(SOURCE, kernel, other, 9)
        assert _block_sizes(text, kernel, other, 9) == expected, other
        assert _block_sizes(text, kernel, other, 8) == _block_sizes(SOURCE, kernel, other, 8)
    assert f"        # Measured on some GPU 2026-01-01, at {head_dim}: why.\n        9: [" in text
    assert max(map(len, text.split("\n"))) <= 120


def test_a_second_measurement_replaces_the_reason_of_the_first() -> None:
    once = rewrite(SOURCE, [Winner("forward", 128, NEW, "first"), Winner("forward", 64, NEW, "kept")], 9, where="GPU 1")
    twice = rewrite(once, [Winner("forward", 128, OLD, "second")], 9, where="GPU 2", one_pass=80)
    assert "first" not in twice and "kept" in twice and "GPU 2, at 128: second." in twice
    assert "ONE_PASS: dict[int, int] = {8: 0, 9: 80, 10: 0}" in twice
    comments = [line for line in SOURCE.split("\n") if line.lstrip().startswith("#")]
    assert all(line in twice for line in comments), "what was known before stays"


def test_a_gpu_without_a_table_is_named() -> None:
    with pytest.raises(ValueError, match=r"no _TABLES\['forward'\]\[7\]"):
        rewrite(SOURCE, [Winner("forward", 128, NEW, "why")], 7, where="GPU")


@pytest.mark.slow
def test_a_walk_with_a_made_up_timer(tmp_path: Path) -> None:
    """The last of the candidates seems the fastest: so it is written, into the folder alone."""
    ran: list[str] = []

    def timer(works: dict[str, Any]) -> dict[str, list[float]]:
        for work in works.values():
            work()
        ran.extend(works)
        return {name: [100.0 / len(ran) / (1 + place)] * 3 for place, name in enumerate(works)}

    tune.tune(tmp_path, torch.device("cpu"), timer, dry=True)
    trials = json.loads((tmp_path / "tune.json").read_text())
    assert {trial["kernel"] for trial in trials} == {"forward", "grad_query", "grad_key_value", "one_pass"}
    assert len(ran) == len(trials) and not any(trial["absent"] for trial in trials)
    text = (tmp_path / "_attention_config.py").read_text()
    ast.parse(text)
    assert text.count("# Measured on ") == 4 and (ROOT / "kernels" / "_attention_config.py").read_text() == SOURCE
