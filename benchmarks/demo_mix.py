"""The clips that the demo trains on, as token grids, in batches of one budget: padded, of one shape each, packed."""

import math
from collections.abc import Callable, Iterator, Sequence
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
    """Full batches of one shape each, without any padding, in an order of which every beginning stands for the mix.

    Shapes are sorted by length and taken where 1/2, 1/4, 3/4, 1/8, … of the mix's tokens lie below. (The commonest
    first, as it was, would be the shortest: a third of the mix's mean length, and attention's work goes with that.)
    """
    tokens: dict[Grid, int] = {}
    for grid in grids:
        tokens[grid] = tokens.get(grid, 0) + math.prod(grid)
    shapes = sorted(tokens, key=math.prod)
    reached = np.cumsum([tokens[shape] for shape in shapes]) / sum(tokens.values())
    places = (int(np.searchsorted(reached, share)) for share in _halves(16 * len(shapes)))
    ordered = [shapes[place] for place in dict.fromkeys(places)]
    return [_padded([grid] * (BUDGET // math.prod(grid))) for grid in ordered]


def _halves(count: int) -> Iterator[float]:
    """1/2, 1/4, 3/4, 1/8, 5/8, 3/8, 7/8 and so on: evenly spread, whenever one stops."""
    for number in range(1, count + 1):
        yield int(f"{number:b}"[::-1], 2) / 2 ** number.bit_length()


def packed(grids: Sequence[Grid]) -> list[Contents]:
    """Planned as the trainer plans them; a pack is always computed at its capacity."""
    packer = StreamingPacker(PackRules(BUDGET, SEGMENTS), look_ahead=LOOK_AHEAD)
    packs = [pack for place, grid in enumerate(grids) for pack in packer.push(place, math.prod(grid))]
    return [Contents(tuple(sorted((grids[place] for place in pack), key=math.prod)), BUDGET) for pack in packs]


WAYS: dict[str, Callable[[Sequence[Grid]], list[Contents]]] = {"padded": padded, "bucketed": bucketed, "packed": packed}


def _padded(batch: Sequence[Grid]) -> Contents:
    return Contents(tuple(batch), len(batch) * max(map(math.prod, batch)))
