"""Packing 10,000 samples on one core, and planning the steps of many workers."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.lengths import Shapes, few_sizes, image_video_mix, log_uniform, uniform
from sora_fast.models.codecs import IdentityCodec
from sora_fast.packing.packer import PackRules, StreamingPacker, balance, pack_offline
from sora_fast.training.data.batches import BatchConfig, Batches
from sora_fast.training.distributed import World

RULES = PackRules(32_768)
RANKS = 8

draws = pytest.mark.parametrize("draw", [image_video_mix, log_uniform, uniform, few_sizes])
Draw = Callable[[int], list[int]]


def _note_quality(benchmark: Any, packs: list[list[int]], lengths: list[int], *, ranks: int = RANKS) -> None:
    """Beside the time: the share of capacity unused, and the share of the ranks' time spent waiting."""
    held = [[lengths[sample % len(lengths)] for sample in pack] for pack in packs]
    costs = [sum(map(RULES.cost, pack)) for pack in held]
    steps = [costs[start : start + ranks] for start in range(0, len(costs), ranks)]
    benchmark.extra_info["waste"] = 1 - sum(map(sum, held)) / (len(packs) * RULES.capacity)
    benchmark.extra_info["imbalance"] = sum(1 - sum(step) / (ranks * max(step)) for step in steps) / len(steps)


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


@pytest.mark.parametrize("workers", [8, 64, 1024])
def test_a_step_of_many_workers(benchmark: Any, workers: int) -> None:
    """What each of them does for the packs of all. To be read as a mean: one step in eleven or so plans the others."""
    source = Shapes(image_video_mix(20_000))
    config = BatchConfig(RULES.capacity, max_segments=1000)
    options = {"patch_size": (1, 4, 4), "codec": IdentityCodec(1), "world": World(0, workers)}
    batches = Batches(source, config, **options)
    steps: list[list[list[int]]] = []
    benchmark.pedantic(lambda: steps.append(batches.plan.next_packs()), rounds=33, warmup_rounds=1)
    _note_quality(benchmark, [pack for step in steps for pack in step], source.lengths, ranks=workers)
