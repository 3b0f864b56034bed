import pytest
import torch

from benchmarks.grid import OPS, WHOLES, headline, headliners, rounds, tiny
from benchmarks.peers import everyone
from benchmarks.rows import COPY, Row
from benchmarks.steps import comparing

CPU = torch.device("cpu")


def test_names_tell_all_plans_apart() -> None:
    plans = rounds(OPS + WHOLES)
    assert len({plan.name for plan in plans}) == len(plans) > 100 and plans[: len(headline())] == headline()


def test_the_headline_is_what_the_issue_asks_for() -> None:
    attention = {(p.model.head_dim, p.pack): headliners(p) for p in headline() if p.op == "packed_attention"}
    assert attention.keys() == {(128, "32k ragged"), (64, "32k ragged"), (72, "32k ragged"), (128, "8k ragged")}
    with_flex = [p for p in headline() if "FlexAttention" in headliners(p)]
    assert len(with_flex) == 1
    wide = {p.op for p in headline() if p.model.width == 3072 and p.pack == "32k ragged"}
    assert wide == {"adaln", "gated_residual", "gated_residual_adaln", "qk_norm_rope"}
    assert "dit_block" in {p.op for p in headline()}


def test_our_torch_backend_is_no_entrant() -> None:
    for plan in rounds(OPS + WHOLES):
        found = comparing.entrants(plan)
        assert "torch" not in found and "triton" in found and set(found) <= set(everyone(plan.op))
    for plan in headline():
        assert tuple(comparing.entrants(plan)) == headliners(plan)


def test_a_copy_of_as_many_bytes_is_timed_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.steps.comparing.everyone", lambda op: {"eager": everyone(op)["eager"]})
    plan = tiny()[1]
    for content in comparing.step(CPU, seconds=0.01, dry=True)(plan.name):
        row = Row(**content)
        assert row.rounds.keys() == {"eager", COPY} and row.errors.keys() == {"torch", "eager"}
        assert (row.tokens, row.series) == (plan.tokens, plan.series)


def test_to_fill_caches_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.steps.comparing.everyone", lambda op: {"eager": everyone(op)["eager"]})
    for content in comparing.step(CPU, seconds=0, dry=True)(tiny()[1].name):
        assert content["rounds"] == {"eager": [0.0]}
