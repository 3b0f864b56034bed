"""Packing 10,000 samples on one core."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.lengths import few_sizes, image_video_mix, log_uniform, uniform
from sora_fast.packing.packer import PackRules, StreamingPacker, balance, pack_offline

RULES = PackRules(32_768)
RANKS = 8

draws = pytest.mark.parametrize("draw", [image_video_mix, log_uniform, uniform, few_sizes])
Draw = Callable[[int], list[int]]


def _note_quality(benchmark: Any, packs: list[list[int]], lengths: list[int]) -> None:
    """Beside the time: the share of capacity unused, and the share of the ranks' time spent waiting."""
    costs = [sum(RULES.cost(lengths[sample]) for sample in pack) for pack in packs]
    steps = [costs[start : start + RANKS] for start in range(0, len(costs), RANKS)]
    benchmark.extra_info["waste"] = 1 - sum(lengths) / (len(packs) * RULES.capacity)
    benchmark.extra_info["imbalance"] = sum(1 - sum(step) / (RANKS * max(step)) for step in steps) / len(steps)


@draws
def test_offline(benchmark: Any, draw: Draw) -> None:
    lengths = draw(10_000)
    benchmark(pack_offline, lengths, RULES)


@draws
def test_balance(benchmark: Any, draw: Draw) -> None:
    lengths = draw(10_000)
    packs = pack_offline(lengths, RULES).packs
    steps = benchmark(balance, packs, lengths, RULES, ranks=RANKS)
    _note_quality(benchmark, [pack for step in steps for pack in step], lengths)


@draws
def test_streaming(benchmark: Any, draw: Draw) -> None:
    lengths = draw(10_000)

    def stream() -> list[list[int]]:
        packer = StreamingPacker(RULES, ranks=RANKS)
        packs = [pack for sample, length in enumerate(lengths) for pack in packer.push(sample, length)]
        return packs + packer.flush()

    _note_quality(benchmark, benchmark(stream), lengths)
