"""Contests under pytest-benchmark: one test a variant, but all variants of a case are timed in turn, round by round.

    @contests("adaln")
    def test_adaln(contest: Contest) -> None:
        contest.enter()

The first test of a case measures everyone who is selected (`-k` and the like leave the others out); each test then
hands its own rounds to pytest-benchmark, by a clock that replays them. So `--benchmark-json`, `--benchmark-compare`
and `--benchmark-autosave` work as ever.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.environment import Ceilings
from benchmarks.grid import Plan, plans
from benchmarks.nvml import Gauge
from benchmarks.peers import everyone
from benchmarks.rows import DIRECTIONS, Row, measure, start_afresh
from benchmarks.timing import ReplayClock, Timing, time_variants

CLOCK = ReplayClock()
# Whom the others are compared with: the first of these that took part.
_BASELINES = ("eager", "SDPA", "torch")


def contests(op: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test one of every plan of `op`, direction and variant."""
    labels = [plan.label for plan in plans(op, on_gpu=torch.cuda.is_available())]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        test = pytest.mark.parametrize("op", [op], ids=[op])(test)
        test = pytest.mark.parametrize("case", labels)(test)
        test = pytest.mark.parametrize("direction", DIRECTIONS)(test)
        test = pytest.mark.parametrize("variant", list(everyone(op)))(test)
        return pytest.mark.benchmark(timer=CLOCK)(test)

    return decorate


@dataclass(frozen=True)
class Arena:
    """What all contests of a session share. record: versions and commit."""

    device: torch.device
    ceilings: Ceilings
    gauge: Gauge | None
    record: dict[str, Any]

    @staticmethod
    def open(record: dict[str, Any]) -> "Arena":
        """Measures the ceilings, before anything else has warmed the device."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Arena(device, Ceilings.measure(device), Gauge(device) if device.type == "cuda" else None, record)

    def measure(self, plan: Plan, variants: Sequence[str], *, timed: bool) -> list[Row]:
        """A row a direction."""
        start_afresh()
        timer = partial(time_variants, device=self.device)
        # Long enough for some ten rounds of everyone, where the case is small.
        timer = partial(timer, seconds=0.5 * len(variants)) if timed else partial(timer, max_samples=1, warmup=0)
        makers = {name: maker for name, maker in everyone(plan.op).items() if name in variants}
        rows = measure(plan.build(self.device), timer, makers, gauge=self.gauge if timed else None)
        return [replace(row, tokens=plan.tokens, series=plan.series) for row in rows]

    def notes(self, row: Row, variant: str) -> dict[str, Any]:
        """What `extra_info` carries, in the words of sora_fast/report/results.py and a few of its own."""
        found = {name: getattr(row, name) for name in ("op", "case", "direction", "tokens", "series", "absent")}
        found |= {"backend": variant, "bytes_moved": row.bytes_moved, "flops": row.flops}
        found |= {"ceilings": asdict(self.ceilings), "error": max(row.errors[variant])}
        if row.flops or row.bytes_moved:
            rate, unit, share = row.rate(variant, self.ceilings)
            found |= {unit: rate, "share_of_ceiling": share}
        baseline = next((name for name in _BASELINES if name in row.rounds), None)
        if baseline:
            medians = {name: Timing.of(row.rounds[name]).median for name in (baseline, variant)}
            found |= {"baseline": baseline, "times_as_fast": medians[baseline] / medians[variant]}
        kept = {name: value for name, value in self.record.items() if value is not None}
        return {**found, **row.notes.get(variant, {}), **kept}


class Contest:
    """One test's part in a contest."""

    def __init__(self, benchmark: Any, row: Row, variant: str, arena: Arena) -> None:
        self.benchmark, self.row, self.variant, self.arena = benchmark, row, variant, arena

    def enter(self) -> None:
        """Hand the variant's rounds to pytest-benchmark; skip the test if the variant is absent."""
        row, variant = self.row, self.variant
        if variant in row.absent:
            pytest.skip(f"{variant}: {row.absent[variant]}")
        self.benchmark.group = f"{row.op}[{row.case}], {row.direction}"
        self.benchmark.extra_info.update(self.arena.notes(row, variant))
        rounds = row.rounds[variant]
        CLOCK.load(rounds)
        self.benchmark.pedantic(CLOCK.tick, setup=CLOCK.restart, rounds=len(rounds))
