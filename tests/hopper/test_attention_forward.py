"""The Hopper kernel of attention, executed by the emulator, against fp64: every shape that an op may hand to it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_fast.masks import SpacetimeMask
from sora_fast.packing import JointLayout, PackedLayout, frame_tokens
from sora_fast.schedule import TileLists, TokenRanges
from tests.helpers import examples
from tests.hopper.cases import NAN, STRIDES, Case, same_bits
from tests.hopper.emulated import library
from tests.layouts import MASKS, packs

DTYPES = [torch.bfloat16, torch.float16]
HEAD_DIMS = range(8, 136, 8)
WINDOW = SpacetimeMask.window(1, 1, 2)
FRAMES = SpacetimeMask.frame_causal()
TOKENS = SpacetimeMask.token_causal()
NO_KEY_FOR_SOME = SpacetimeMask(t=(1, 2), h=(-3, -1))
# Ranges of tokens that are met entirely, and partly; lists of tiles, both with and without raster places.
KINDS = [SpacetimeMask.full(), FRAMES, TOKENS, WINDOW, SpacetimeMask(h=(-2, 1), causal_tokens=True), NO_KEY_FOR_SOME]


def several_tiles(**options) -> PackedLayout:
    """Segments of three tiles, of one, of a token, of none; padding."""
    grids = [(5, 6, 9), (1, 1, 1), (0, 2, 2), (2, 6, 7), (1, 2, 2)]
    return PackedLayout.from_grids(grids, **{"capacity": 370, "max_segments": 6, **options})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    mask = draw(MASKS)
    pack = draw(packs(mask=mask, max_grids=3, tile_sizes=(16, 32, 64, 128, 128, 128)))
    return Case(pack.layout, mask, **draw(FORMS))


FORMS = st.fixed_dictionaries(
    {
        "heads": st.integers(1, 2),
        "group": st.sampled_from([1, 1, 2, 3]),
        "head_dim": st.sampled_from(HEAD_DIMS),
        "strides": st.sampled_from(STRIDES),
        "dtype": st.sampled_from(DTYPES),
        "max_pairs": st.sampled_from([None, None, 0, 1, 3]),
    }
)


@st.composite
def cross_cases(draw: st.DrawFn) -> Case:
    """Segments any of which may have nothing on one side or on both; keys in tiles of another size."""
    lengths = st.sampled_from([0, 1, 5, 77, 128, 129, 200])
    sides = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=4))
    layouts = [
        PackedLayout.from_grids(
            [(1, 1, length) for length in side],
            capacity=sum(side) + draw(st.integers(0, 5)),
            tile_size=draw(st.sampled_from([32, 128])),
        )
        for side in zip(*sides, strict=True)
    ]
    return Case(layouts[0], kv_layout=layouts[1], **draw(FORMS))


@examples(60)
@given(case=cases() | cross_cases(), seed=st.integers(0, 2**32), blocks=st.integers(1, 7))
def test_random_cases_match_the_oracle(case: Case, seed: int, blocks: int) -> None:
    case.check(library(), seed=seed, blocks=blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims_match_the_oracle(head_dim: int, dtype: torch.dtype) -> None:
    layout = PackedLayout.from_grids([(2, 5, 20), (1, 3, 4)], capacity=220)
    Case(layout, FRAMES, head_dim=head_dim, dtype=dtype, heads=2).check(library())


@pytest.mark.parametrize("mask", KINDS, ids=str)
@pytest.mark.parametrize("order", ["raster", "tiled"])
def test_masks_match_the_oracle(mask: SpacetimeMask, order: str) -> None:
    case = Case(several_tiles(order=order), mask, head_dim=80, group=2)
    has_ranges = mask.is_full or (mask in (FRAMES, TOKENS) and order == "raster")
    assert isinstance(case.schedule().by_query, TokenRanges if has_ranges else TileLists)
    case.check(library(), seed=1)


@pytest.mark.parametrize("strides", STRIDES)
def test_strides_match_the_oracle(strides: str) -> None:
    Case(several_tiles(), heads=2, group=2, head_dim=72, strides=strides).check(library(), blocks=3)


@pytest.mark.parametrize("grid", [(1022, 1, 1), (1, 510, 1), (1, 1, 510)])
def test_the_longest_axes_match_the_oracle(grid: tuple[int, int, int]) -> None:
    """The coordinates that use the last bit of each packed field."""
    for mask in (SpacetimeMask.window(2, 3, 4), SpacetimeMask(t=(None, 0), h=(-300, 0), w=(0, 300))):
        Case(PackedLayout.from_grids([grid], order="tiled"), mask, head_dim=32).check(library())


@pytest.mark.parametrize("tile_size", [16, 32, 64])
@pytest.mark.parametrize("mask", [SpacetimeMask.full(), WINDOW, FRAMES], ids=str)
def test_smaller_tiles_match_the_oracle(mask: SpacetimeMask, tile_size: int) -> None:
    layout = PackedLayout.from_grids([(3, 5, 6), (2, 2, 9)], capacity=130, tile_size=tile_size, order="tiled")
    Case(layout, mask, head_dim=64, heads=2).check(library())


@pytest.mark.parametrize("mask", KINDS, ids=str)
def test_dropped_tokens_match_the_oracle(mask: SpacetimeMask) -> None:
    grids, keep = [(4, 9, 10), (3, 5, 8), (2, 2, 2)], [[*range(0, 360, 2)], [*range(3, 100, 3)], []]
    for order in ("raster", "tiled"):
        layout = PackedLayout.from_grids(grids, keep=keep, order=order, for_mask=mask, capacity=220)
        Case(layout, mask, head_dim=96).check(library())


def test_cross_attention_matches_the_oracle() -> None:
    text = PackedLayout.from_grids([(n, 1, 1) for n in (190, 0, 5, 37, 1)], capacity=240, max_segments=6)
    case = Case(several_tiles(), kv_layout=text, heads=2, group=2)
    assert isinstance(case.schedule().by_query, TokenRanges)
    case.check(library())


def test_new_frames_attend_old_ones() -> None:
    """Both sides have tiles of their own, and places on one grid."""
    grids, parts = [(6, 6, 8), (3, 4, 4), (2, 3, 3)], [[(4, 6), (0, 0), (1, 2)], [(0, 6), (0, 3), (0, 0)]]
    keep = [[frame_tokens(grid, *frames) for grid, frames in zip(grids, part, strict=True)] for part in parts]
    layout, keys = (PackedLayout.from_grids(grids, keep=kept, capacity=380, order="tiled") for kept in keep)
    Case(layout, WINDOW, keys, heads=2, group=2).check(library())


def test_a_joint_layout_matches_the_oracle() -> None:
    """With and without room for its lists: what has no place then is tested like the rest."""
    text = PackedLayout.from_grids([(n, 1, 1) for n in (77, 0, 5, 37, 1)], capacity=130, max_segments=6)
    joint = JointLayout.build(text, several_tiles(order="tiled"))
    for max_pairs in (None, 2):
        Case(joint.layout, WINDOW, heads=2, group=2, max_pairs=max_pairs).check(library())


@pytest.mark.parametrize("capacity", [0, 5])
def test_no_text_at_all(capacity: int) -> None:
    text = PackedLayout.from_grids([], capacity=capacity, max_segments=6)
    Case(several_tiles(), kv_layout=text, heads=2).check(library())


def test_empty_packs() -> None:
    for options in ({}, {"capacity": 5}, {"capacity": 300, "max_segments": 3}):
        for mask in (SpacetimeMask.full(), WINDOW):
            Case(PackedLayout.from_grids([], **options), mask, group=2).check(library())


@pytest.mark.parametrize("max_pairs", [0, 1, 2, 4])
@pytest.mark.parametrize("mask", [WINDOW, SpacetimeMask(h=(-2, 1), causal_tokens=True)], ids=str)
def test_lists_that_overflow_give_the_same_numbers(mask: SpacetimeMask, max_pairs: int) -> None:
    layout = PackedLayout.from_grids([(6, 6, 8), (2, 3, 5)], order="tiled", tile_size=64)
    case = Case(layout, mask, max_pairs=max_pairs)
    assert int(case.schedule().overflow) > 0
    case.check(library())


@pytest.mark.parametrize("mask", KINDS, ids=str)
def test_whatever_stands_in_other_segments_changes_no_bit(mask: SpacetimeMask) -> None:
    """NaN, infinities and outliers in all rows of every other segment: past a segment's end, and before its start."""
    case = Case(several_tiles(), mask, head_dim=80)
    schedule, segments = case.schedule(), case.layout.segment_ids
    clean = library().attention(*case.inputs(), schedule)
    for poison in (NAN, float("inf"), 1e4):
        for parity in (0, 1):
            elsewhere = segments % 2 == parity  # padding, segment -1, is NaN in both
            qkv = [x.masked_fill(elsewhere[:, None, None], poison) for x in case.inputs()]
            found = library().attention(*qkv, schedule, seed=parity)
            mine = ~elsewhere
            assert torch.equal(found.out[mine], clean.out[mine]) and torch.equal(found.lse[:, mine], clean.lse[:, mine])


@pytest.mark.parametrize("mask", [SpacetimeMask.full(), TOKENS, WINDOW], ids=str)
def test_a_segment_alone_gives_the_bits_that_it_gives_in_a_pack(mask: SpacetimeMask) -> None:
    grids = [(3, 5, 10), (1, 1, 7), (4, 8, 8)]
    pack = Case(PackedLayout.from_grids(grids, capacity=440), mask, heads=2)
    qkv, offsets = pack.inputs(), pack.layout.cu_seqlens.tolist()
    packed = library().attention(*qkv, pack.schedule())
    for grid, start, stop in zip(grids, offsets, offsets[1:], strict=False):
        alone = Case(PackedLayout.from_grids([grid]), mask)
        found = library().attention(*(x[start:stop] for x in qkv), alone.schedule())
        assert torch.equal(found.out, packed.out[start:stop]) and torch.equal(found.lse, packed.lse[:, start:stop])


@pytest.mark.parametrize("keys", [1, 7, 8, 63, 64, 127, 128, 129, 255])
def test_an_outlier_just_past_the_end_is_not_met(keys: int) -> None:
    """A mask that is off by one moves an output of random numbers by a thousandth only; this one by everything."""
    layout = PackedLayout.from_grids([(1, 1, keys), (1, 1, 3)])
    case = Case(layout)
    q, k, v = case.inputs()
    q[:], k[keys], v[keys] = 1, 50, 1000
    k[keys - 1], v[keys - 1] = 0.25, 3  # and the last one is not left out
    result = library().attention(q, k, v, case.schedule())
    first = replace(case, layout=PackedLayout.from_grids([(1, 1, keys)]))
    mine = replace(result, out=result.out[:keys], lse=result.lse[:, :keys])
    first.compare(mine, [x[:keys] for x in (q, k, v)])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 30.0])
@pytest.mark.parametrize("mask", [SpacetimeMask.full(), WINDOW], ids=str)
def test_scales(mask: SpacetimeMask, scale: float) -> None:
    """0 weighs all keys alike; 30 makes one key the only one, of a score of some thousands."""
    layout = PackedLayout.from_grids([(3, 8, 8), (2, 3, 5)], capacity=230)
    Case(layout, mask, scale=scale, dtype=torch.float16).check(library())


def test_scores_far_from_zero() -> None:
    """All of them near -6,000 or 6,000: whoever lets a key of score 0 in, or takes 0 for the largest, sees it."""
    layout = PackedLayout.from_grids([(3, 8, 8)], capacity=200)
    for sign in (-1, 1):
        for mask in (SpacetimeMask.full(), WINDOW):
            case = Case(layout, mask, dtype=torch.float16, scale=1.0)
            q, k, v = case.inputs()
            q[..., 0], k[..., 0] = 128, 48 * sign
            case.compare(library().attention(q, k, v, case.schedule(), scale=1.0), [q, k, v])


@pytest.mark.parametrize("mask", [SpacetimeMask.full(), WINDOW], ids=str)
def test_bits_do_not_depend_on_the_grid(mask: SpacetimeMask) -> None:
    case = Case(several_tiles(tile_size=64, order="tiled"), mask, heads=3, head_dim=64)
    qkv, schedule = case.inputs(), case.schedule()
    one = library().attention(*qkv, schedule, blocks=1)
    for blocks in (2, 3, 5, 7, 64):
        assert same_bits(one, library().attention(*qkv, schedule, blocks=blocks, seed=blocks))


def test_many_tiles_and_heads_are_all_dealt() -> None:
    """More than sixteen tiles, of which a block takes sixteen at a time; more than 32 places to search."""
    layout = PackedLayout.from_grids([(1, 1, 1 + n % 20) for n in range(45)], tile_size=16, capacity=480)
    assert int((layout.tile_offsets.diff() > 0).sum()) > 48
    Case(layout, heads=2, head_dim=8).check(library(), blocks=5)
