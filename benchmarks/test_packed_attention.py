"""Packed attention on a CPU, forward and backward, beside PyTorch's SDPA on the same tokens.

The peers of a full mask: SDPA segment after segment, and SDPA over the pack under the dense block-diagonal mask. The
peer of a window: SDPA segment after segment under each one's dense mask.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.ops import packed_attention
from sora_fast.packing import PackedLayout
from sora_fast.schedule import TileSchedule

# About 4,000 tokens in 8 videos and images of mixed shape.
GRIDS = [(8, 12, 10), (4, 16, 12), (1, 24, 20), (8, 8, 8), (2, 10, 20), (1, 16, 16), (6, 9, 8), (3, 7, 11)]
LONG = [(8, 16, 16), (8, 12, 20)]
HEADS, HEAD_DIM = 8, 64
WINDOW = SpacetimeMask.window(1, 2, 2)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def packed(grids: list[tuple[int, int, int]], mask: SpacetimeMask) -> Attention:
    """Ours; the schedule is shared by all layers of a model, so it is not timed."""
    layout = PackedLayout.from_grids(grids, order="raster" if mask.is_full else "tiled", for_mask=mask)
    schedule = TileSchedule.build(layout, mask)
    return lambda q, k, v: packed_attention(q, k, v, layout, schedule)


def one_by_one(grids: list[tuple[int, int, int]], mask: SpacetimeMask) -> Attention:
    """SDPA, segment after segment."""
    layouts = [PackedLayout.from_grids([grid]) for grid in grids]
    masks = [None if mask.is_full else mask.materialize(layout) for layout in layouts]
    lengths = [layout.capacity for layout in layouts]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(*(x.split(lengths) for x in (q, k, v)), masks, strict=True)
        return torch.cat([_sdpa(*piece) for piece in pieces])

    return run


def dense_mask(grids: list[tuple[int, int, int]], mask: SpacetimeMask) -> Attention:
    """SDPA over the whole pack, most of it masked away."""
    allowed = mask.materialize(PackedLayout.from_grids(grids))
    return lambda q, k, v: _sdpa(q, k, v, allowed)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)[0].transpose(0, 1)


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize(
    ("make", "grids", "mask"),
    [
        pytest.param(packed, GRIDS, SpacetimeMask.full(), id="full, packed"),
        pytest.param(one_by_one, GRIDS, SpacetimeMask.full(), id="full, SDPA one by one"),
        pytest.param(dense_mask, GRIDS, SpacetimeMask.full(), id="full, SDPA dense mask"),
        pytest.param(packed, LONG, SpacetimeMask.full(), id="long, full, packed"),
        pytest.param(packed, LONG, WINDOW, id="long, window, packed"),
        pytest.param(one_by_one, LONG, WINDOW, id="long, window, SDPA one by one"),
    ],
)
def test_packed_attention(
    benchmark: Any, make: Callable[..., Attention], grids: list[Any], mask: SpacetimeMask, direction: str
) -> None:
    torch.manual_seed(0)
    tokens = PackedLayout.from_grids(grids).capacity
    qkv = torch.randn(tokens, 3, HEADS, HEAD_DIM, requires_grad=direction != "forward")
    gradient = torch.randn(tokens, HEADS, HEAD_DIM)
    attend = make(grids, mask)

    def step() -> None:
        out = attend(*qkv.unbind(1))
        if out.requires_grad:
            torch.autograd.grad(out, qkv, gradient)

    step()
    benchmark.pedantic(step, rounds=5)
