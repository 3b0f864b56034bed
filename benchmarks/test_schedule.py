"""Building a TileSchedule on a CPU: once a batch, whatever the number of layers."""

from typing import Any

import pytest

from sora_fast.masks import SpacetimeMask
from sora_fast.packing import PackedLayout
from sora_fast.schedule import TileSchedule

WINDOW = SpacetimeMask.window(9, 12, 12)
PAST = SpacetimeMask.frame_causal()


@pytest.mark.parametrize(
    ("grids", "mask"),
    [
        pytest.param([(8, 48, 80), (1, 30, 40)], SpacetimeMask.full(), id="32k tokens, full"),
        pytest.param([(8, 48, 80), (1, 30, 40)], PAST, id="32k tokens, frame-causal"),
        pytest.param([(8, 48, 80), (1, 30, 40)], WINDOW, id="32k tokens, window"),
        pytest.param([(30, 48, 80)] * 9, SpacetimeMask.full(), id="1M tokens, full"),
        pytest.param([(30, 48, 80)] * 9, PAST, id="1M tokens, frame-causal"),
        pytest.param([(30, 48, 80)] * 9, WINDOW, id="1M tokens, window"),
        pytest.param([(4, 16, 24)] * 64, WINDOW, id="98k tokens, 64 videos, window"),
    ],
)
def test_schedule(benchmark: Any, grids: list[tuple[int, int, int]], mask: SpacetimeMask) -> None:
    layout = PackedLayout.from_grids(grids, order="raster" if mask.sees_past else "tiled", for_mask=mask)
    rounds = 1 if layout.capacity > 1_000_000 else 5
    schedule = benchmark.pedantic(TileSchedule.build, args=(layout, mask), rounds=rounds)
    schedule.check()
