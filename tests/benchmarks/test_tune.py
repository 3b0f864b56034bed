import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks._checkout import ROOT
from benchmarks.shapes import MASKS
from benchmarks.steps import tuning
from benchmarks.timing import Timing
from benchmarks.tune import CANDIDATES, HEAD_DIMS, KINDS, TABLE, Item, Trial, Winner, items, one_pass_up_to, winners
from sora_fast.kernels import _attention_config as config
from sora_fast.kernels._launch import recording

CPU = torch.device("cpu")
OLD, NEW = (128, 64, 8, 3), (64, 64, 4, 3)
FAST, SLOW, CLOSE = (Timing(middle, middle - 0.1, middle + 0.1, 9) for middle in (1.0, 2.0, 1.1))


def _trials(present: Timing | None, other: Timing | None, head_dim: int = 128, mask: str = "full") -> list[Trial]:
    old = Trial(head_dim, mask, "forward", OLD, present=True, time=present, absent="" if present else "too large")
    return [old, Trial(head_dim, mask, "forward", NEW, time=other, absent="" if other else "spills")]


def test_the_fastest_wins_and_says_why() -> None:
    assert list(winners(_trials(SLOW, FAST))) == [Winner(128, "full", "forward", NEW, "2.00× as fast as 128×64 w8 s3")]


@pytest.mark.parametrize(
    "trials",
    [
        pytest.param(_trials(FAST, SLOW), id="slower"),
        pytest.param(_trials(CLOSE, FAST), id="within the noise"),
        pytest.param(_trials(FAST, None), id="does not run"),
        pytest.param(_trials(SLOW, FAST)[1:], id="nothing to compare with"),
    ],
)
def test_otherwise_nothing_changes(trials: list[Trial]) -> None:
    assert not list(winners(trials))


def test_what_does_not_run_loses_to_anything() -> None:
    assert [winner.reason for winner in winners(_trials(None, SLOW))] == ["128×64 w8 s3 does not run"]


def test_names_tell_configurations_apart() -> None:
    assert [tune.name(blocks) for blocks in (OLD, (*OLD, 1), (*NEW, 2))] == ["128×64 w8 s3"] * 2 + ["64×64 w4 s3 p2"]
    for candidates in CANDIDATES.values():
        assert len({tune.name(blocks) for blocks in candidates}) == len(candidates)


def test_kinds_of_masks_do_not_mix() -> None:
    found = winners([*_trials(SLOW, FAST, mask="boxes"), *_trials(FAST, SLOW, mask="full")])
    assert [(winner.mask, winner.blocks) for winner in found] == [("boxes", NEW)]


def test_one_pass_is_taken_where_it_wins_without_a_gap_and_for_every_mask() -> None:
    def trials(head_dim: int, one: Timing, two: Timing, mask: str = "full") -> list[Trial]:
        return [
            Trial(head_dim, mask, "one_pass", OLD, time=one),
            Trial(head_dim, mask, "grad_query", OLD, present=True, time=two),
        ]

    wins, loses = trials(64, FAST, SLOW), trials(80, SLOW, FAST)
    assert one_pass_up_to(wins) == 64
    assert one_pass_up_to([*wins, *loses, *trials(128, FAST, SLOW)]) == 64
    assert one_pass_up_to([*wins, *trials(64, SLOW, FAST, "boxes")]) == 0
    assert one_pass_up_to(loses) == 0 and one_pass_up_to(_trials(SLOW, FAST)) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "kernels" / TABLE, tmp_path)
    return tmp_path


def _write(folder: Path, trials: list[Trial], where: str, major: int = 9) -> str:
    text = tune.written(folder, trials, major=major, where=where)
    (folder / TABLE).write_text(text)
    return text


def test_the_table_is_written_whole_and_what_was_known_stays(folder: Path) -> None:
    _write(folder, _trials(SLOW, FAST), "GPU 1")
    _write(folder, _trials(SLOW, FAST, head_dim=64, mask="boxes"), "GPU 2", major=10)
    text = _write(folder, _trials(SLOW, FAST), "GPU 3")
    measured, one_pass = tune._read(folder / TABLE)
    assert measured == {
        (9, "forward", 128, "full"): (NEW, "GPU 3: 2.00× as fast as 128×64 w8 s3"),
        (10, "forward", 64, "boxes"): (NEW, "GPU 2: 2.00× as fast as 128×64 w8 s3"),
    }
    assert one_pass == {} and max(map(len, text.splitlines())) <= 120
    assert text.startswith((ROOT / "kernels" / TABLE).read_text().split("MEASURED:")[0])


def test_one_pass_goes_there_too(folder: Path) -> None:
    trials = [
        Trial(64, "full", "one_pass", OLD, present=True, time=FAST),
        Trial(64, "full", "grad_query", OLD, present=True, time=SLOW),
    ]
    _write(folder, trials, "GPU 1")
    assert tune._read(folder / TABLE) == ({}, {9: (64, "GPU 1: as far as it was tried")})
    assert tune.written(folder, trials, major=9, where="GPU 2") is None, "nothing new"


def test_where_nothing_wins_nothing_is_written(folder: Path) -> None:
    assert tune.written(folder, _trials(FAST, SLOW), major=9, where="GPU") is None
    assert tune.written(folder, [], major=9, where="GPU") is None


def test_the_shipped_table_is_as_it_would_be_written() -> None:
    measured, one_pass = tune._read(ROOT / "kernels" / TABLE)
    text = (ROOT / "kernels" / TABLE).read_text()
    again = text.split(tune._MEASURED)[0] + tune._table(tune._MEASURED, measured)
    assert again + tune._COMMENT + tune._table(tune._ONE_PASS, one_pass) == text
    assert all(isinstance(config.BlockSizes(*numbers), config.BlockSizes) for numbers, _ in measured.values())


def test_what_was_measured_is_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.MEASURED, (9, "forward", 128, "boxes"), ((64, 64, 4, 5), "why"))
    found = config.block_sizes("forward", torch.bfloat16, 128, (9, 0), "boxes")
    assert tuple(asdict(found).values())[:4] == (64, 64, 4, 5)
    for other in ((9, "full", torch.bfloat16), (10, "boxes", torch.bfloat16), (9, "boxes", torch.float32)):
        major, mask, dtype = other
        assert config.block_sizes("forward", dtype, 128, (major, 0), mask) != found


def test_every_item_is_tried_once_with_the_present_one_first() -> None:
    found = items()
    assert len({item.name for item in found}) == len(found) == len(HEAD_DIMS) * len(KINDS) * len(CANDIDATES)
    assert found[0] == Item(128, "full", "forward") and set(KINDS.values()) <= MASKS.keys()
    for item in found:
        candidates = tuning.candidates_of(item, CPU)
        present = config.block_sizes(item.kernel, torch.bfloat16, item.head_dim, (9, 0), item.mask)
        assert candidates[0] == tuple(asdict(present).values()) and len(set(candidates)) == len(candidates) >= 5


def _launched(item: Item, blocks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Options of the launches of a pass that takes the candidate."""
    case = replace_dtype(tuning.case_of(item, CPU, dry=True))
    with tuning.configured(item, blocks, 9), recording((9, 0)) as recorder:
        outputs = case.forward()
        if item.kernel != "forward":
            case.backward(outputs, outputs)
    return [meta for _, _, meta in recorder.launches]


def replace_dtype(case: Any) -> Any:
    """In bf16: products of fp32 have a configuration of their own."""
    args = tuple(
        x.detach().bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in case.args
    )
    return replace(case, args=args)


@pytest.mark.parametrize("mask", KINDS)
@pytest.mark.parametrize("kernel", CANDIDATES)
@pytest.mark.parametrize("head_dim", [128, 72])
def test_a_candidate_is_what_is_launched(kernel: str, mask: str, head_dim: int) -> None:
    """For each kind of mask, whatever the kernels call it."""
    item, odd = Item(head_dim, mask, kernel), (16, 16, 2, 7)
    assert any((meta.get("num_warps"), meta.get("num_stages")) == (2, 7) for meta in _launched(item, odd))
    assert not any(meta.get("num_stages") == 7 for meta in _launched(item, (16, 16, 2, 3)))


def test_to_fill_a_cache_everything_runs_once_and_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, ...]] = []
    monkeypatch.setattr(tuning, "case_of", lambda *_, **__: Broken())
    real = tuning.configured

    def configured(item: Item, blocks: tuple[int, ...], major: int) -> Any:
        tried.append(blocks)
        return real(item, blocks, major)

    monkeypatch.setattr(tuning, "configured", configured)
    assert tuning.step(CPU, seconds=0, dry=False)("D128, full, forward") == []
    assert tried == tuning.candidates_of(Item(128, "full", "forward"), CPU), "one that fails costs the others nothing"


class Broken:
    def forward(self) -> None:
        raise RuntimeError("out of shared memory")
