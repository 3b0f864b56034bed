import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.ops import Rope3D, packed_attention, patch_embed, qk_norm_rope
from sora_fast.packing import JointLayout, PackedLayout, RaggedLatents
from sora_fast.packing.coordinates import EVERYWHERE, MAX_GRID, inside, packed
from sora_fast.schedule import TileSchedule
from tests.helpers import examples
from tests.layouts import MASKS, Pack, packs
from tests.modulated import no_recompilation
from tests.schedule.test_tile_schedule import check_lists

WINDOW = SpacetimeMask.window(1, 1, 1)
# A text and a video, a text alone, an image alone, nothing, an image with its text.
LENGTHS, GRIDS = [5, 40, 0, 0, 3], [(3, 4, 5), (0, 0, 0), (1, 4, 4), (0, 0, 0), (1, 2, 3)]


def texts(lengths: list[int], **options: int) -> PackedLayout:
    return PackedLayout.from_grids([(length, 1, 1) for length in lengths], **options)


def both(*, order: str = "tiled", spare: int = 4) -> tuple[PackedLayout, PackedLayout]:
    """Of LENGTHS and GRIDS."""
    text = texts(LENGTHS, capacity=48 + spare, max_segments=6, tile_size=32)
    video = PackedLayout.from_grids(GRIDS, order=order, capacity=82 + spare, max_segments=6, tile_size=16)
    return text, video


def dense(text: Tensor, video: Tensor, sides: tuple[PackedLayout, PackedLayout], mask: SpacetimeMask) -> list[Tensor]:
    """q, k, v of both [3, N, H, D] → outputs of both: each segment alone, its mask one matrix; zeros for padding."""
    allowed = mask.materialize(sides[1])
    outs = [torch.zeros_like(text[0]), torch.zeros_like(video[0])]
    for segment in range(sides[0].max_segments):
        mine = [(side.segment_ids == segment).nonzero().squeeze(1) for side in sides]
        count = len(mine[0])
        q, k, v = (torch.cat([t[mine[0]], x[mine[1]]]) for t, x in zip(text, video, strict=True))
        seen = torch.ones(len(q), len(q), dtype=torch.bool)
        seen[count:, count:] = allowed[mine[1]][:, mine[1]]
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        parts = torch.einsum("hqk,khd->qhd", weights, v).split([count, len(q) - count])
        outs = [out.index_copy(0, place, part) for out, place, part in zip(outs, mine, parts, strict=True)]
    return outs


STRIDED = SpacetimeMask.window(1, 2, 2, stride=(1, 2, 2), clamp=True)


@pytest.mark.parametrize(
    ("mask", "text_first", "backend"),
    [
        (SpacetimeMask.full(), True, "torch"),
        (SpacetimeMask.frame_causal(), False, "torch"),
        (SpacetimeMask.token_causal(), True, "torch"),
        (STRIDED, False, "torch"),
        (SpacetimeMask.token_causal(), False, "triton"),
        (STRIDED, True, "triton"),
    ],
)
def test_attention_is_dense_joint_attention(
    mask: SpacetimeMask, text_first: bool, backend: str, device: torch.device
) -> None:
    """To 1e-6, with NaN in all padding; gradients to the same share of the largest."""
    torch.manual_seed(0)
    sides = both()
    streams = [torch.randn(3, side.capacity, 2, 8, dtype=torch.float64) for side in sides]
    given = [torch.randn(side.capacity, 2, 8, dtype=torch.float64) for side in sides]
    exact = [x.clone().requires_grad_() for x in streams]
    truth = dense(*exact, sides, mask)
    grads = torch.autograd.grad(sum((out * g).sum() for out, g in zip(truth, given, strict=True)), exact)

    for side, stream, g in zip(sides, streams, given, strict=True):
        stream[:, side.segment_ids < 0] = float("nan")
        g[side.segment_ids < 0] = float("nan")
    leaves = [x.float().to(device).requires_grad_() for x in streams]
    joint = JointLayout.build(*(side.to(device) for side in sides), text_first=text_first)
    q, k, v = (joint.merge(*pair) for pair in zip(*leaves, strict=True))
    outs = joint.split(packed_attention(q, k, v, joint.layout, mask, backend=backend))
    ours = torch.autograd.grad(outs, leaves, [g.float().to(device) for g in given])
    for out, exactly in zip(outs, truth, strict=True):
        assert (out.cpu().double() - exactly).abs().max() < 1e-6
    for grad, exactly in zip(ours, grads, strict=True):
        assert (grad.cpu().double() - exactly).abs().max() < 1e-6 * max(1, exactly.abs().max())


@st.composite
def joints(draw: st.DrawFn) -> tuple[JointLayout, PackedLayout, PackedLayout]:
    """Any video layout, a text for each of its segments, in either order."""
    pack: Pack = draw(packs(max_grids=3))
    segments = pack.layout.max_segments
    lengths = draw(st.lists(st.sampled_from([0, 1, 5, 20, 40]), min_size=segments, max_size=segments))
    text = texts(lengths, capacity=sum(lengths) + draw(st.integers(0, 9)), tile_size=draw(st.sampled_from([16, 32])))
    return JointLayout.build(text, pack.layout, text_first=draw(st.booleans())), text, pack.layout


@examples(300)
@given(joints(), MASKS, st.sampled_from([0, 3, 10, 1 << 24]))
def test_schedules_of_joint_layouts(
    sides: tuple[JointLayout, PackedLayout, PackedLayout], mask: SpacetimeMask, max_pairs: int
) -> None:
    """Lists, and the test of every pair, against the dense mask; and that against the video's own."""
    joint, _, video = sides
    dense = mask.materialize(joint.layout)
    is_video = (joint.layout.segment_ids >= 0) & (joint.layout.raster_index >= 0)
    assert torch.equal(dense[is_video][:, is_video], mask.materialize(video)[: is_video.sum(), : is_video.sum()])
    of_text = dense & ~(is_video[:, None] & is_video)
    same = (joint.layout.segment_ids[:, None] == joint.layout.segment_ids) & (joint.layout.segment_ids >= 0)
    assert torch.equal(of_text, same & ~(is_video[:, None] & is_video))

    schedule = TileSchedule.build(joint.layout, mask, max_pairs=max_pairs)
    check_lists(schedule.by_query, joint.layout, joint.layout, dense)
    check_lists(schedule.by_key, joint.layout, joint.layout, dense.T, by_key=True)
    allowed = inside(schedule.key_place, schedule.query_low[:, None], schedule.query_high[:, None]) & same
    if mask.causal_tokens:
        allowed &= joint.layout.raster_index <= schedule.query_raster[:, None]
    assert torch.equal(allowed, dense)


@given(joints())
def test_every_segment_is_its_text_and_its_video(sides: tuple[JointLayout, PackedLayout, PackedLayout]) -> None:
    joint, text, video = sides
    layout = joint.layout
    layout_tiles = layout.tile_offsets.diff()
    assert layout.tile_offsets[-1] == layout.cu_seqlens[-1] and (layout_tiles >= 0).all()
    sizes = [size for side in (text, video) for size in side.tile_offsets.diff().tolist()]
    assert sorted(layout_tiles.tolist()) == sorted(sizes) and (layout_tiles.bool().int().diff() <= 0).all()
    for segment in range(layout.max_segments):
        start, end = layout.cu_seqlens[segment : segment + 2].tolist()
        count = int(text.cu_seqlens[segment + 1] - text.cu_seqlens[segment])
        own = slice(start + count, end) if joint.text_first else slice(start, end - count)
        mine = slice(*video.cu_seqlens[segment : segment + 2].tolist())
        assert (layout.segment_ids[start:end] == segment).all()
        assert torch.equal(layout.coords[own], video.coords[mine])
        assert torch.equal(layout.raster_index[own], video.raster_index[mine])
        assert (layout.raster_index[start:end] < 0).sum() == count


@given(joints())
def test_merge_and_split_undo_each_other(sides: tuple[JointLayout, PackedLayout, PackedLayout]) -> None:
    """Gradients too; NaN in padding comes back as zero, in values and in gradients."""
    joint, *layouts = sides
    streams = [torch.randn(side.capacity, 2) for side in layouts]
    for side, stream in zip(layouts, streams, strict=True):
        stream[side.segment_ids < 0] = float("nan")
    leaves = [stream.clone().requires_grad_() for stream in streams]
    back = joint.split(joint.merge(*leaves))
    grads = torch.autograd.grad(back, leaves, streams)
    for side, stream, value, grad in zip(layouts, streams, back, grads, strict=True):
        used = side.segment_ids >= 0
        assert torch.equal(value[used], stream[used]) and torch.equal(grad[used], stream[used])
        if not joint.is_plain:
            assert not value[~used].any() and not grad[~used].any()


@pytest.mark.parametrize("text_first", [True, False])
def test_one_segment_that_fills_its_capacity_is_not_copied(text_first: bool) -> None:
    text, video = (
        texts([4], capacity=4 if text_first else 7),
        PackedLayout.from_grids([(1, 2, 3)], capacity=8 if text_first else 6),
    )
    joint = JointLayout.build(text, video, text_first=text_first)
    x = torch.randn(joint.layout.capacity, 2)
    first = joint.split(x)[0 if text_first else 1]
    assert joint.is_plain and first.data_ptr() == x.data_ptr()
    assert torch.equal(joint.merge(*joint.split(x)), x)
    assert not JointLayout.build(text, video, text_first=not text_first).is_plain


def test_one_graph_for_twenty_mixes() -> None:
    def attend(text: PackedLayout, video: PackedLayout, words: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        joint = JointLayout.build(text, video)
        x = joint.merge(words, patches)
        return joint.split(packed_attention(x, x, x, joint.layout, WINDOW))

    words, patches = torch.randn(30, 1, 8), torch.randn(70, 1, 8)
    with no_recompilation():
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        for mix in range(20):
            text = texts([mix % 7, 5, 1 + mix % 3], capacity=30, max_segments=4)
            grids = [(1 + mix % 3, 3, 4), (1, 1 + mix % 5, 2), (0, 1, 1) if mix % 2 else (2, 2, 2)]
            video = PackedLayout.from_grids(grids, capacity=70, max_segments=4, order="tiled", tile_size=16)
            for ours, plain in zip(
                compiled(text, video, words, patches), attend(text, video, words, patches), strict=True
            ):
                torch.testing.assert_close(ours, plain)


def test_a_text_is_not_turned() -> None:
    """Rotary positions of the joint sequence are those of the video, and none for the text."""
    text, video = both(spare=0)
    joint = JointLayout.build(text, video)
    rope = Rope3D((4, 2, 2))
    q, k = (torch.randn(3, side.capacity, 1, 8)[0] for side in (text, video))
    turned = qk_norm_rope(k, k, None, None, video, rope)[0]
    x = joint.merge(q, k)
    out = joint.split(qk_norm_rope(x, x, None, None, joint.layout, rope)[0])
    torch.testing.assert_close(out[1], turned)


def test_everywhere_lies_in_every_box() -> None:
    ends = [sorted({0, 1, 2, size // 2, size - 1, size}) for size in MAX_GRID]
    high = packed(*(axis.flatten() for axis in torch.meshgrid(*map(torch.tensor, ends), indexing="ij"))).int()
    low = high + packed(1, 1, 1)
    everywhere = torch.tensor(EVERYWHERE, dtype=torch.int32)
    assert inside(everywhere, low[:, None], high[None]).all()
    assert not inside(torch.zeros_like(high), low[:, None], high[None]).any()


def test_bad_input_is_named() -> None:
    text, video = both()
    joint = JointLayout.build(text, video)
    with pytest.raises(ValueError, match="text: 2 segments, but the video layout has 6"):
        JointLayout.build(texts([1, 2]), video)
    with pytest.raises(ValueError, match="video: a joint layout already"):
        JointLayout.build(text, joint.layout)
    latents = RaggedLatents.from_list([torch.zeros(1, 1, 1, 1)], max_segments=6)
    with pytest.raises(ValueError, match="layout: a joint one, whose texts have no patches"):
        patch_embed(latents, torch.zeros(1, 1), None, joint.layout, (1, 1, 1))
    x = torch.zeros(joint.layout.capacity, 1, 8)
    alone = PackedLayout.from_grids([(1, 1, 1)], capacity=joint.layout.capacity, max_segments=6)
    with pytest.raises(ValueError, match="mask: a schedule for a layout of"):
        packed_attention(x, x, x, joint.layout, TileSchedule.build(alone))
