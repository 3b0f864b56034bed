import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rows
from benchmarks._checkout import ROOT
from benchmarks.contests import Arena
from benchmarks.entrants import Absent, Entrant
from benchmarks.environment import Ceilings
from benchmarks.grid import OPS, WHOLES, Plan, headline, plans
from benchmarks.peers import PEERS, attention, everyone
from benchmarks.rows import measure
from benchmarks.shapes import MASKS, MODELS, PACKS, Model
from benchmarks.timing import time_variants
from sora_fast.report import read_result

CPU = torch.device("cpu")
ONCE = partial(time_variants, device=CPU, max_samples=1, warmup=0)
ATTENTION = Plan("packed_attention", Model(32, 2), "tiny", "full")


@pytest.mark.parametrize("mask", MASKS)
def test_sdpa_does_the_work_of_every_mask(mask: str) -> None:
    peers = {"SDPA": attention.sdpa, "SDPA padded": attention.sdpa_padded}
    for row in measure(replace(ATTENTION, mask=mask).build(CPU), ONCE, peers):
        assert row.rounds.keys() == ({"SDPA", "SDPA padded"} if mask == "full" else {"SDPA"})
        assert max(row.errors["SDPA"]) < 1e-6


MASKED = ("packed_attention", "schedule")


@pytest.mark.parametrize("op", [op for op in (*OPS, *WHOLES) if op not in MASKED])
def test_eager_peers_do_the_work(op: str) -> None:
    for row in measure(Plan(op, Model(64, 2), "tiny").build(CPU), ONCE, {"eager": PEERS[op]["eager"]}):
        assert not row.absent and max(row.errors["eager"]) < 1e-6


def test_who_is_wrong_is_not_timed() -> None:
    def shifted(case: Any) -> Entrant:
        peer = attention.sdpa(case)
        return replace(peer, forward=lambda q, k, v: peer.forward(q, k, v) * 1.001)

    for row in measure(ATTENTION.build(CPU), ONCE, {"SDPA": attention.sdpa, "shifted": shifted}):
        assert row.rounds.keys() == {"SDPA"} and row.absent["shifted"].startswith("wrong: 1.0e-03 from the truth")


def test_who_cannot_is_absent_and_ours_may_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(case: Any) -> Entrant:
        raise Absent("it is on holiday")

    def broken(case: Any) -> Entrant:
        raise RuntimeError("out of memory")

    (row, _) = measure(ATTENTION.build(CPU), ONCE, {"torch": rows.OURS["torch"], "a": absent, "b": broken})
    assert row.absent == {"a": "it is on holiday", "b": "RuntimeError: out of memory"} and row.rounds.keys() == {
        "torch"
    }
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(ATTENTION.build(CPU), ONCE, {"triton": broken})


@pytest.mark.parametrize("on_gpu", [False, True])
def test_names_tell_the_plans_apart(on_gpu: bool) -> None:
    for op in (*OPS, *WHOLES):
        found = plans(op, on_gpu=on_gpu)
        assert len({plan.label for plan in found}) == len(found) > 0
        assert all(plan.mask in MASKS if op in MASKED else not plan.mask for plan in found)
        curves = {(plan.series, plan.tokens) for plan in found}
        assert len(curves) == len(found), "two plans at one place of a curve"


def test_the_grid_of_the_gpu_is_the_whole_of_it() -> None:
    """Head dims 64, 72, 128; 8k, 32k, 128k tokens; every mask; uniform and ragged; and windows on the 115k video."""
    found = {(plan.model.head_dim, plan.pack, plan.mask) for plan in plans("packed_attention", on_gpu=True)}
    for head_dim in (64, 72, 128):
        for mask in ("full", "frame_causal", "spatial", "temporal"):
            for pack in PACKS:
                if pack.split(" ")[0] in ("8k", "32k", "128k"):
                    assert (head_dim, pack, mask) in found
        assert {(head_dim, "115k video", mask) for mask in ("full", "window", "window strided")} <= found
    assert set(headline()) <= {plan for op in (*OPS, *WHOLES) for plan in plans(op, on_gpu=True)}


def test_packs_of_a_name_have_its_number_of_tokens() -> None:
    for name, pack in PACKS.items():
        if name.endswith(("uniform", "ragged")):
            assert pack.tokens == int(name.split("k")[0]) * 1024, name
    assert PACKS["115k video"].tokens == 115_200 and PACKS["tiny"].tokens == 47
    assert [MODELS[name].head_dim for name in ("DiT-XL", "1.3B", "14B")] == [72, 128, 128]


def test_notes_compare_with_the_baseline_and_the_ceiling() -> None:
    arena = Arena(CPU, Ceilings(10.0, 0.5), None, {"torch": "2.13", "cuda": None})
    plan = Plan("adaln", Model(64, 2), "tiny")
    row = arena.measure(plan, ["torch", "eager", "Liger"], timed=False)[0]
    row.rounds = {"torch": [2.0], "eager": [4.0]}
    notes = arena.notes(row, "torch")
    assert (notes["baseline"], notes["times_as_fast"]) == ("eager", 2.0)
    assert notes["GB/s"] == pytest.approx(row.bytes_moved / 2e6) and notes["share_of_ceiling"] == notes["GB/s"] / 10
    assert (notes["tokens"], notes["series"], notes["backend"]) == (47, "C64, tiny", "torch")
    assert notes["absent"] == {"Liger": "it needs a GPU"} and "cuda" not in notes


def test_everyone_has_both_backends() -> None:
    assert all({"torch", "triton", "eager"} <= everyone(op).keys() for op in (*OPS, *WHOLES) if op not in MASKED)


@pytest.mark.timeout(1200)  # it starts a pytest of its own, whose imports take minutes on a busy machine
def test_pytest_benchmark_gets_rounds_that_took_turns(tmp_path: Path) -> None:
    """Through the plugin's own files: what it writes is what the report reads, and what it compares with later."""
    pytest.importorskip("pytest_benchmark")
    file, words = tmp_path / "results.json", "C384 and 2k and (eager or torch or triton) and not compiled"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_segment_mean.py", "-q", "-k", words]
    options = [f"--benchmark-json={file}", f"--benchmark-storage={tmp_path}", "--benchmark-autosave"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # of this test: the plugin would time nothing
    ran = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = read_result(file)
    case = ("segment_mean", "C384, 2k ragged")
    assert result.by_key.keys() == {(*case, d, b) for d in ("forward", "backward") for b in ("torch", "eager")}
    assert result.ceilings and result.environment["torch"] == torch.__version__
    assert "triton: Triton needs a GPU" in result.missing
    rounds = {m.backend: m.time.samples for m in result.measurements if m.direction == "forward"}
    assert rounds["torch"] == rounds["eager"] >= 3
    (saved,) = tmp_path.rglob("0001_*.json")
    assert len(json.loads(saved.read_text())["benchmarks"]) == 4
