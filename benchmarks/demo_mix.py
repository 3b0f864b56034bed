"""The clips that the demo trains on, as token grids, in batches of one budget: padded, of one shape each, packed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.packing import Grid
from sora_fast.demo.digits import DigitsConfig
from sora_fast.packing import token_grid
from sora_fast.packing.packer import PackRules, StreamingPacker

PATCH, CHANNELS = (1, 8, 8), 1
# As the demo has them, over all workers.
BUDGET, LOOK_AHEAD, SEGMENTS = 2048, 256, 128

# From clips of one shape to clips of which one in a few is ten times as long as the others; the demo's own in between.
MIXES = {
    "one shape": DigitsConfig(durations=(8,), sides=(20,), image_share=0.0, seen=(), unseen=()),
    "demo": DigitsConfig(),
    "more ragged": DigitsConfig(size_bias=2.0, duration_bias=0.5, image_share=0.4),
}


@dataclass(frozen=True)
class Contents:
    """What a batch holds. computed: tokens, padding included."""

    grids: tuple[Grid, ...]
    computed: int

    @property
    def useful(self) -> int:
        return sum(map(math.prod, self.grids))


def draw(mix: DigitsConfig, count: int, *, seed: int = 0) -> list[Grid]:
    """Token grids of `count` clips and stills, as `MovingDigits` draws their shapes."""
    random = np.random.default_rng(seed)
    places = np.minimum(np.searchsorted(mix.shape_odds, random.random(count)), len(mix.shapes) - 1)
    stills = random.random(count) < mix.image_share
    shapes = [(1, *mix.shapes[p][1:]) if still else mix.shapes[p] for p, still in zip(places, stills, strict=True)]
    return [token_grid((CHANNELS, *shape), PATCH) for shape in shapes]


def padded(grids: Sequence[Grid]) -> list[Contents]:
    """As they come, as many as the budget holds once each is padded to the longest of its batch."""
    batches: list[Contents] = []
    batch: list[Grid] = []
    for grid in grids:
        if (len(batch) + 1) * max(map(math.prod, [*batch, grid])) > BUDGET:
            batches.append(_padded(batch))
            batch = []
        batch.append(grid)
    return batches


def bucketed(grids: Sequence[Grid]) -> list[Contents]:
    """Full batches of one shape each, without any padding; the commonest shapes first."""
    counts: dict[Grid, int] = {}
    for grid in grids:
        counts[grid] = counts.get(grid, 0) + 1
    common = sorted(counts, key=lambda grid: -counts[grid] * math.prod(grid))
    return [_padded([grid] * (BUDGET // math.prod(grid))) for grid in common]


def packed(grids: Sequence[Grid]) -> list[Contents]:
    """Planned as the trainer plans them; a pack is always computed at its capacity."""
    packer = StreamingPacker(PackRules(BUDGET, SEGMENTS), look_ahead=LOOK_AHEAD)
    packs = [pack for place, grid in enumerate(grids) for pack in packer.push(place, math.prod(grid))]
    return [Contents(tuple(sorted((grids[place] for place in pack), key=math.prod)), BUDGET) for pack in packs]


WAYS: dict[str, Callable[[Sequence[Grid]], list[Contents]]] = {"padded": padded, "bucketed": bucketed, "packed": packed}


def _padded(batch: Sequence[Grid]) -> Contents:
    return Contents(tuple(batch), len(batch) * max(map(math.prod, batch)))
