"""Packed attention on a CPU, forward and backward, beside PyTorch's SDPA on the same tokens.

The peers of a full mask: SDPA segment after segment, and SDPA over the pack under the dense block-diagonal mask. The
peers of a window: the full mask, and SDPA under the dense one. Of both: compiled FlexAttention, which has no backward
pass on a CPU; its mask is built for every batch, and so is our schedule beside it.

Joint attention of texts and videos, merged and split at every call, has SDPA of each segment as its peer, under the
dense mask where there is one. New frames over a cache have the same attention without one: of all frames, anew.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sora_fast.masks import SpacetimeMask
from sora_fast.ops import packed_attention
from sora_fast.packing import JointLayout, PackedKVCache, PackedLayout, frame_tokens
from sora_fast.schedule import TileSchedule

# 8,652 tokens in 8 videos and images of mixed shape; one long video.
GRIDS = [(4, 16, 24), (8, 12, 10), (2, 24, 20), (8, 16, 8), (1, 32, 32), (6, 10, 20), (4, 16, 16), (3, 14, 22)]
LONG = [(16, 24, 24)]
HEADS, HEAD_DIM = 8, 64
WINDOW = SpacetimeMask.window(1, 2, 2)
PAST = SpacetimeMask.frame_causal()

TEXT = 226  # tokens beside every video, as in CogVideoX
STREAM = SpacetimeMask.window(4, None, None, causal=True)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def laid_out(grids: list[tuple[int, int, int]], mask: SpacetimeMask) -> PackedLayout:
    """In the order that suits the mask."""
    return PackedLayout.from_grids(grids, order="raster" if mask.is_full or mask.sees_past else "tiled", for_mask=mask)


def built(grids: list[tuple[int, int, int]], mask: SpacetimeMask) -> Attention:
    """Ours, with a new schedule at every call."""
    layout = laid_out(grids, mask)
    return lambda q, k, v: packed_attention(q, k, v, layout, mask)


def packed(grids: list[tuple[int, int, int]], mask: SpacetimeMask) -> Attention:
    """Ours; the schedule is shared by all layers of a model, so it is not timed."""
    layout = laid_out(grids, mask)
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


def flex(grids: list[tuple[int, int, int]], mask: SpacetimeMask) -> Attention:
    """Compiled FlexAttention, with a new BlockMask at every call, as its documentation has it for packed documents."""
    layout = PackedLayout.from_grids(grids)
    segment, coords, size = layout.segment_ids, layout.coords, layout.capacity
    bounds = [(axis, high) for axis, (_, high) in enumerate((mask.t, mask.h, mask.w)) if high is not None]
    attend = torch.compile(flex_attention, dynamic=False)

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = segment[query] == segment[key]
        for axis, high in bounds:
            inside = inside & ((coords[query, axis] - coords[key, axis]).abs() <= high)
        return inside

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = create_block_mask(allowed, None, None, size, size, device="cpu")
        return attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=blocks)[0].transpose(0, 1)

    return run


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
        pytest.param(built, GRIDS, SpacetimeMask.full(), id="full, packed and built"),
        pytest.param(flex, GRIDS, SpacetimeMask.full(), id="full, FlexAttention"),
        pytest.param(packed, LONG, SpacetimeMask.full(), id="long, full, packed"),
        pytest.param(packed, LONG, WINDOW, id="long, window, packed"),
        pytest.param(one_by_one, LONG, WINDOW, id="long, window, SDPA dense mask"),
        pytest.param(built, LONG, WINDOW, id="long, window, packed and built"),
        pytest.param(flex, LONG, WINDOW, id="long, window, FlexAttention"),
        pytest.param(packed, LONG, PAST, id="long, frame-causal, packed"),
        pytest.param(one_by_one, LONG, PAST, id="long, frame-causal, SDPA dense mask"),
    ],
)
def test_packed_attention(
    benchmark: Any,
    request: pytest.FixtureRequest,
    make: Callable[..., Attention],
    grids: list[Any],
    mask: SpacetimeMask,
    direction: str,
) -> None:
    if make is flex and direction != "forward":
        pytest.skip("FlexAttention has no backward pass on a CPU")
    tokens = PackedLayout.from_grids(grids).capacity
    _time(benchmark, request, make(grids, mask), tokens, direction)


def _time(
    benchmark: Any, request: pytest.FixtureRequest, attend: Attention, tokens: int, direction: str = "forward"
) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(tokens, 3, HEADS, HEAD_DIM, requires_grad=direction != "forward")
    gradient = torch.randn(tokens, HEADS, HEAD_DIM)

    def step() -> None:
        out = attend(*qkv.unbind(1))
        if out.requires_grad:
            torch.autograd.grad(out, qkv, gradient)

    step()
    case, _, backend = request.node.callspec.id.removesuffix(f"-{direction}").rpartition(", ")
    benchmark.extra_info.update(op="packed_attention", case=case, direction=direction, backend=backend)
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)  # the allocator has what it needs by then


def joint(grids: list[tuple[int, int, int]], mask: SpacetimeMask) -> Attention:
    """Ours, of tokens that come as those of all texts, then those of all videos."""
    text = PackedLayout.from_grids([(TEXT, 1, 1)] * len(grids))
    layout = JointLayout.build(text, laid_out(grids, mask))
    schedule = TileSchedule.build(layout.layout, mask)

    def run(*qkv: Tensor) -> Tensor:
        merged = [layout.merge(x[: text.capacity], x[text.capacity :]) for x in qkv]
        return torch.cat(layout.split(packed_attention(*merged, layout.layout, schedule)))

    return run


def joint_one_by_one(grids: list[tuple[int, int, int]], mask: SpacetimeMask) -> Attention:
    """SDPA, segment after segment."""
    text, videos = PackedLayout.from_grids([(TEXT, 1, 1)]), [PackedLayout.from_grids([grid]) for grid in grids]
    masks = [None if mask.is_full else mask.materialize(JointLayout.build(text, video).layout) for video in videos]
    lengths = [video.capacity for video in videos]

    def segments(x: Tensor) -> list[Tensor]:
        texts, tokens = x.split([TEXT * len(grids), sum(lengths)])
        return [torch.cat(pair) for pair in zip(texts.split(TEXT), tokens.split(lengths), strict=True)]

    def run(*qkv: Tensor) -> Tensor:
        outs = [_sdpa(*piece) for piece in zip(*map(segments, qkv), masks, strict=True)]
        return torch.cat([out[:TEXT] for out in outs] + [out[TEXT:] for out in outs])

    return run


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize(
    ("make", "grids", "mask"),
    [
        pytest.param(joint, GRIDS, SpacetimeMask.full(), id="joint, full, packed"),
        pytest.param(joint_one_by_one, GRIDS, SpacetimeMask.full(), id="joint, full, SDPA one by one"),
        pytest.param(joint, LONG, WINDOW, id="joint, long, window, packed"),
        pytest.param(joint_one_by_one, LONG, WINDOW, id="joint, long, window, SDPA dense mask"),
    ],
)
def test_joint_attention(
    benchmark: Any,
    request: pytest.FixtureRequest,
    make: Callable[..., Attention],
    grids: list[Any],
    mask: SpacetimeMask,
    direction: str,
) -> None:
    tokens = PackedLayout.from_grids(grids).capacity + TEXT * len(grids)
    _time(benchmark, request, make(grids, mask), tokens, direction)


def cached(grid: tuple[int, int, int], mask: SpacetimeMask) -> Attention:
    """The last frame alone, over a cache of those that it sees; what it adds to the cache is written over."""
    frames = [PackedLayout.from_grids([grid], keep=[frame_tokens(grid, t, t + 1)]) for t in range(grid[0])]
    held, size = -mask.t[0], frames[0].capacity
    cache = PackedKVCache.empty(
        1, HEADS, HEAD_DIM, capacity=(held + 1) * size, new_capacity=size, max_segments=1, dtype=torch.float32
    )
    for frame in frames:
        cache.append_(frame, window=held)
    schedule = TileSchedule.build(frames[-1], mask, kv_layout=cache.layout)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.write_(0, k[-size:], v[-size:])
        return packed_attention(q[-size:], keys, values, frames[-1], schedule, kv_layout=cache.layout)

    return run


def anew(grid: tuple[int, int, int], mask: SpacetimeMask) -> Attention:
    """All frames, without a cache."""
    return packed([grid], mask)


@pytest.mark.parametrize(
    "make", [pytest.param(cached, id="next frame, cached"), pytest.param(anew, id="next frame, all frames anew")]
)
def test_next_frame(benchmark: Any, request: pytest.FixtureRequest, make: Callable[..., Attention]) -> None:
    _time(benchmark, request, make(LONG[0], STREAM), PackedLayout.from_grids(LONG).capacity)
