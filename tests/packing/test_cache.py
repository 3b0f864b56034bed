import pytest
import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.ops import packed_attention
from sora_fast.packing import JointLayout, PackedKVCache, PackedLayout, frame_tokens
from sora_fast.schedule import TileSchedule
from tests.modulated import no_recompilation

# A long video, a short one, an image, one that loses half of its tokens, nothing.
GRIDS = [(6, 2, 3), (3, 3, 2), (1, 4, 4), (5, 2, 4), (0, 1, 1)]
KEPT = [range(36), range(18), range(16), range(0, 40, 2), range(0)]
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8


def part(first: int, end: int, *, order: str = "raster", capacity: int | None = None) -> PackedLayout:
    """The tokens that there are of frames first … end − 1 of every video."""
    keep = []
    for grid, kept in zip(GRIDS, KEPT, strict=True):
        frames = frame_tokens(grid, min(first, grid[0]), min(end, grid[0]))
        keep.append([token for token in frames.tolist() if token in kept])
    sizes = {"capacity": capacity, "max_segments": 6, "tile_size": 16}
    return PackedLayout.from_grids(GRIDS, keep=keep, order=order, **sizes)


WHOLE = part(0, 6)


def of_part(x: Tensor, layout: PackedLayout) -> Tensor:
    """Rows of the whole [N, …] that a part has, NaN in the padding."""
    ours, theirs = (side.segment_ids << 16 | side.raster_index for side in (layout, WHOLE))
    rows = (ours[:, None] == theirs).int().argmax(dim=1)
    return x[rows].masked_fill((layout.segment_ids < 0).view(-1, *[1] * (x.dim() - 1)), float("nan"))


def empty(capacity: int, new_capacity: int, device: torch.device) -> PackedKVCache:
    sizes = {"capacity": capacity, "new_capacity": new_capacity, "max_segments": 6, "tile_size": 16}
    return PackedKVCache.empty(LAYERS, KV_HEADS, HEAD_DIM, **sizes, dtype=torch.float32, device=device)


def step(
    cache: PackedKVCache, new: PackedLayout, qkv: list[Tensor], mask: SpacetimeMask, window: int | None, backend: str
) -> list[Tensor]:
    """What every layer makes of new frames."""
    cache.append_(new, window=window)
    schedule = TileSchedule.build(new, mask, kv_layout=cache.layout)
    outs = []
    for layer in range(LAYERS):
        for draft in (0.5, 1.0):  # what is written last counts
            k, v = cache.write_(layer, qkv[1][:, layer] * draft, qkv[2][:, layer] * draft)
        outs.append(packed_attention(qkv[0][:, layer], k, v, new, schedule, kv_layout=cache.layout, backend=backend))
    return outs


@pytest.mark.parametrize(
    ("mask", "window", "capacity", "frames", "backend"),
    [
        (SpacetimeMask.frame_causal(), None, 90, 1, "torch"),
        (SpacetimeMask.token_causal(), None, 95, 2, "torch"),
        (SpacetimeMask.window(2, 1, 1, causal=True), 2, 64, 1, "torch"),
        (SpacetimeMask.window(2, None, 1, causal=True, clamp=True), 2, 80, 2, "torch"),
        (SpacetimeMask.window(9, 1, None, causal=True), 9, 90, 3, "torch"),  # larger than all that there is
        (SpacetimeMask.window(0, None, None, causal=True), 0, 45, 1, "torch"),
        (SpacetimeMask.window(2, 1, 1, causal=True), 2, 80, 2, "triton"),
    ],
)
def test_frame_by_frame_is_attention_over_the_whole(
    mask: SpacetimeMask, window: int | None, capacity: int, frames: int, backend: str, device: torch.device
) -> None:
    """Segments that end before others, NaN in all padding, new frames in either order."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(WHOLE.capacity, LAYERS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    whole = [packed_attention(q[:, i], k[:, i], v[:, i], WHOLE, mask, backend="torch") for i in range(LAYERS)]
    room = max(int((part(t, t + frames).segment_ids >= 0).sum()) for t in range(0, 6, frames)) + 3
    cache = empty(capacity, room, device)
    with torch.no_grad():
        cache.memory.fill_(float("nan"))
        for first in range(0, 6, frames):
            new = part(first, first + frames, capacity=room, order="tiled" if first % 2 else "raster").to(device)
            qkv = [of_part(x, new.to("cpu")).to(device) for x in (q, k, v)]
            for out, exact in zip(step(cache, new, qkv, mask, window, backend), whole, strict=True):
                expected = of_part(exact, new.to("cpu")).nan_to_num(0)
                torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_one_graph_for_all_steps() -> None:
    """Compiled, and without: the same cache, changed in place."""
    torch.manual_seed(0)
    mask = SpacetimeMask.window(2, 1, 1, causal=True)
    caches = [empty(90, 50, torch.device("cpu")) for _ in range(2)]
    memory = caches[0].memory.data_ptr()
    with torch.no_grad(), no_recompilation():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for first in range(6):
            new = part(first, first + 1, capacity=50)
            qkv = [torch.randn(50, LAYERS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
            inputs = new, qkv, mask, 2, "torch"
            torch.testing.assert_close(compiled(caches[0], *inputs), step(caches[1], *inputs))
    assert caches[0].memory.data_ptr() == memory
    assert torch.equal(caches[0].layout.cu_seqlens, caches[1].layout.cu_seqlens)


def test_what_is_held() -> None:
    """The last frames of each segment; all of one without new frames; nothing of one that has ended."""
    cache = empty(90, 50, torch.device("cpu"))
    for first in range(5):
        cache.append_(part(first, first + 1, capacity=50), window=2)
    frames = [sorted(set(cache.layout.coords[cache.layout.segment_ids == s, 0].tolist())) for s in range(6)]
    assert frames == [[2, 3, 4], [0, 1, 2], [0], [2, 3, 4], [], []]
    assert cache.layout.grids[1].tolist() == [3, 3, 2]
    ended = torch.tensor([False, True, False, True, False, False])
    cache.append_(part(5, 6, capacity=50), ended=ended)
    frames = [sorted(set(cache.layout.coords[cache.layout.segment_ids == s, 0].tolist())) for s in range(6)]
    assert frames == [[2, 3, 4, 5], [], [0], [], [], []]
    tiles = cache.layout.tile_offsets
    assert (tiles.diff() <= 16).all() and tiles[-1] == cache.layout.cu_seqlens[-1]


def test_a_schedule_is_refreshed_for_the_next_frames() -> None:
    mask, cache = SpacetimeMask.frame_causal(), empty(90, 50, torch.device("cpu"))
    new = part(0, 1, capacity=50)
    schedule = TileSchedule.build(new, mask, kv_layout=cache.append_(new).layout)
    following = part(1, 2, capacity=50)
    schedule.refresh_(following, kv_layout=cache.append_(following).layout)
    right = TileSchedule.build(following, mask, kv_layout=cache.layout)
    assert torch.equal(schedule.by_query.end - schedule.by_query.begin, right.by_query.end - right.by_query.begin)
    assert torch.equal(schedule.key_place, right.key_place)


def test_bad_input_is_named() -> None:
    cache, new = empty(30, 50, torch.device("cpu")), part(0, 1, capacity=50)
    with pytest.raises(ValueError, match="new: with it 32 tokens are held, but the cache has room for 30"):
        cache.append_(new)
    with pytest.raises(ValueError, match="new: capacity 60; the cache was made for 50"):
        cache.append_(part(0, 1, capacity=60))
    with pytest.raises(ValueError, match="window: -1; it must be a number of frames ≥ 0, or None"):
        cache.append_(new, window=-1)
    text = PackedLayout.from_grids([], capacity=5, max_segments=6)
    with pytest.raises(ValueError, match="new: a joint layout"):
        cache.append_(JointLayout.build(text, new).layout)
    x = torch.zeros(50, KV_HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match="v: it has a gradient"):
        cache.write_(0, x, torch.zeros_like(x, requires_grad=True))
