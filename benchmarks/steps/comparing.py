"""Our ops beside their peers: the plans of benchmarks/grid.py, each checked against fp64 and then timed."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from benchmarks.grid import OPS, WHOLES, Plan, headline, headliners, rounds, tiny
from benchmarks.nvml import Gauge
from benchmarks.peers import everyone
from benchmarks.rows import Maker, Timer, measure, start_afresh
from benchmarks.timing import Work, time_variants


def step(device: torch.device, *, seconds: float, dry: bool) -> Callable[[str], list[dict[str, Any]]]:
    """Of a plan's name: its rows. seconds: of rounds a direction; 0: everything runs once, and nothing is timed, which
    fills the compilers' caches. dry: the plans are tiny."""
    known = {plan.name: plan for plan in (tiny() if dry else rounds(OPS + WHOLES))}
    gauge = Gauge(device) if device.type == "cuda" and seconds else None

    def do(name: str) -> list[dict[str, Any]]:
        start_afresh()
        plan = known[name]
        makers = entrants(plan)
        rows = measure(plan.build(device), timer(device, seconds), makers, gauge=gauge, with_copy=seconds > 0)
        return [asdict(replace(row, tokens=plan.tokens, series=plan.series)) for row in rows]

    return do


def entrants(plan: Plan) -> Mapping[str, Maker]:
    """The headline's own, or everyone but our torch backend: the peers show what PyTorch can do, in less time. In a dry
    walk those that need no compiler."""
    makers = {name: maker for name, maker in everyone(plan.op).items() if name != "torch"}
    if plan in tiny():
        return {name: maker for name, maker in makers.items() if not any(part in name for part in ("compiled", "Flex"))}
    return {name: makers[name] for name in headliners(plan)} if plan in headline() else makers


def timer(device: torch.device, seconds: float) -> Timer:
    """Takes rounds for so long, and none if that is nothing."""
    return partial(time_variants, device=device, seconds=seconds) if seconds else untimed


def untimed(variants: Mapping[str, Work]) -> dict[str, list[float]]:
    return {name: [0.0] for name in variants}
