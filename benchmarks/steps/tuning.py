"""Candidates of attention's launch configurations, in turn: those that compile, fit, and agree with fp64."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.cases import Case
from benchmarks.entrants import Entrant, Ours
from benchmarks.grid import Plan
from benchmarks.rows import DIRECTIONS, Maker, measure, start_afresh
from benchmarks.shapes import Model
from benchmarks.steps.comparing import timer
from benchmarks.tune import CANDIDATES, KINDS, Item, Numbers, Trial, items, name
from sora_fast import use_backend
from sora_fast.kernels import _attention_config as config
from sora_fast.kernels._launch import target_arch


def step(device: torch.device, *, seconds: float, dry: bool) -> Callable[[str], list[dict[str, Any]]]:
    """Of an item's name: its trials, on 32k ragged tokens. seconds: of rounds; 0: every candidate runs once, unchecked,
    which fills the compiler's cache. dry: two candidates on a tiny pack."""
    known = {item.name: item for item in items()}

    def do(title: str) -> list[dict[str, Any]]:
        start_afresh()
        item = known[title]
        case, candidates = case_of(item, device, dry=dry), candidates_of(item, device)
        if not seconds:
            return _warmed(case, item, candidates, device)
        return _tried(case, item, candidates[: 2 if dry else None], device, seconds)

    return do


def case_of(item: Item, device: torch.device, dtype: torch.dtype | None = None, *, dry: bool = False) -> Case:
    """What an item's candidates are timed on. dtype: as for `Plan.build`."""
    heads, pack = (1, "tiny") if dry else (16, "32k ragged")
    return Plan("packed_attention", Model(heads * item.head_dim, heads), pack, KINDS[item.mask]).build(device, dtype)


def candidates_of(item: Item, device: torch.device) -> list[Numbers]:
    """The present one first."""
    present = config.block_sizes(item.kernel, torch.bfloat16, item.head_dim, target_arch(device), item.mask)
    # What the candidates do not say has its default.
    blocks = [present, *(config.BlockSizes(*numbers) for numbers in CANDIDATES[item.kernel])]
    return list(dict.fromkeys(tuple(asdict(one).values()) for one in blocks))


def _tried(
    case: Case, item: Item, candidates: Sequence[Numbers], device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    direction = DIRECTIONS[0] if item.kernel == "forward" else DIRECTIONS[1]
    makers = {name(blocks): _maker(item, blocks, target_arch(device)[0]) for blocks in candidates}
    (row,) = measure(case, timer(device, seconds), makers, directions=[direction])
    times, absent = row.times, row.absent
    return [
        asdict(
            Trial(
                **asdict(item),
                blocks=blocks,
                present=blocks == candidates[0],
                time=times.get(name(blocks)),
                absent=absent.get(name(blocks), ""),
            )
        )
        for blocks in candidates
    ]


def _warmed(case: Case, item: Item, candidates: Sequence[Numbers], device: torch.device) -> list[dict[str, Any]]:
    for blocks in candidates:
        with configured(item, blocks, target_arch(device)[0]):
            try:
                case.forward() if item.kernel == "forward" else case.step()
            except Exception as error:  # who times it will say so
                print(f"{name(blocks)}: {type(error).__name__}: {error}"[:300], flush=True)
    return []


@contextmanager
def configured(item: Item, blocks: Numbers, major: int) -> Iterator[None]:
    """Inside, the kernels take this configuration for the item's pass, whatever kind of mask they find."""
    form = dict.fromkeys(config.ONE_PASS, 256 if item.kernel == "one_pass" else 0)
    entries = {(major, item.kernel, item.head_dim, kind): (blocks, "on trial") for kind in KINDS}
    with patch.dict(config.MEASURED, entries), patch.dict(config.ONE_PASS, form), use_backend("triton"):
        yield


def _maker(item: Item, blocks: Numbers, major: int) -> Maker:
    def make(case: Case) -> Entrant:
        return Ours(case.inputs, lambda *_: case.forward(), within=lambda: configured(item, blocks, major), case=case)

    return make
