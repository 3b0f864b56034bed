"""The two passes of the Hopper backward, executed by the emulator, against fp64 gradients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.packing import JointLayout, PackedLayout, frame_tokens
from sora_fast.proof.cases import slopes
from tests.helpers import assert_within_rule, examples
from tests.hopper.cases import NAN, STRIDES, Case, random_rows
from tests.hopper.emulated import Gradients, library
from tests.hopper.test_attention_forward import (
    DTYPES,
    FRAMES,
    HEAD_DIMS,
    KINDS,
    TOKENS,
    WINDOW,
    cases,
    cross_cases,
    several_tiles,
)

Upstream = tuple[Tensor, Tensor | None]


def upstream(case: Case, *, lse: bool = True) -> Upstream:
    """Gradients of output and logsumexp; NaN in the padding of the first, 0 where a query has no key in the second."""
    torch.manual_seed(1)
    grad_out = random_rows(case.layout.capacity, case.heads * case.group, case.head_dim, case.dtype, case.strides)
    grad_out.masked_fill_((case.layout.segment_ids < 0)[:, None, None], NAN)
    some = case.allowed().any(dim=1)
    return grad_out, torch.randn(case.heads * case.group, len(grad_out)) * some if lse else None


def gradients(case: Case, qkv: list[Tensor], given: Upstream, **manner: int) -> Gradients:
    forward = library().attention(*qkv, case.schedule(), scale=case.scale)
    inputs = *given, *qkv, forward.out, forward.lse, case.schedule()
    return library().gradients(*inputs, scale=case.scale, **manner)


def expected(case: Case, qkv: list[Tensor], given: Upstream, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """By autograd through one matrix of scores in `dtype`."""
    grad_out, grad_lse = given
    own = [x.nan_to_num(0).to(dtype).requires_grad_() for x in qkv]
    out, lse = case.dense(own, dtype)
    total = (out * grad_out.nan_to_num(0).to(dtype)).sum()
    if grad_lse is not None:
        total = total + (lse.masked_fill(torch.isinf(lse), 0) * grad_lse.to(lse.dtype)).sum()
    if not total.requires_grad:  # nothing meets anything
        return tuple(map(torch.zeros_like, own))
    return tuple(
        torch.zeros_like(x) if grad is None else grad
        for x, grad in zip(own, torch.autograd.grad(total, own, allow_unused=True), strict=True)
    )


def check(case: Case, *, lse: bool = True, **manner: int) -> None:
    """The error rule for all gradients; exact zeros in the padding, and for whom nothing is allowed."""
    qkv, given = case.inputs(), upstream(case, lse=lse)
    found = gradients(case, qkv, given, **manner)
    compare(case, qkv, given, found)


def compare(case: Case, qkv: list[Tensor], given: Upstream, found: Gradients) -> None:
    plain, oracle = (expected(case, qkv, given, dtype) for dtype in (case.dtype, torch.float64))
    allowed = case.allowed()
    sides = allowed.any(dim=1), allowed.any(dim=0), allowed.any(dim=0)
    size = slopes(*qkv, given[0])
    for name, some, ours, theirs, right, terms in zip(
        ("q", "k", "v"), sides, (found.q, found.k, found.v), plain, oracle, (size, size, 1.0), strict=True
    ):
        assert (ours[~some] == 0).all(), f"grad_{name} of what meets nothing"
        assert_within_rule(ours, theirs, right, name=f"grad_{name}", terms=terms)


@examples(15)
@given(case=cases() | cross_cases(), seed=st.integers(0, 2**32), blocks=st.integers(1, 5), lse=st.booleans())
def test_random_cases_match_the_oracle(case: Case, seed: int, blocks: int, lse: bool) -> None:
    check(case, lse=lse, seed=seed, blocks=blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 88, 96, 120, 128])
def test_head_dims_match_the_oracle(head_dim: int, dtype: torch.dtype) -> None:
    assert head_dim in HEAD_DIMS
    layout = PackedLayout.from_grids([(2, 5, 18), (1, 3, 4)], capacity=200)
    check(Case(layout, FRAMES, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("mask", KINDS, ids=str)
@pytest.mark.parametrize("order", ["raster", "tiled"])
def test_masks_match_the_oracle(mask: SpacetimeMask, order: str) -> None:
    check(Case(several_tiles(order=order), mask, group=2), seed=1)


@pytest.mark.parametrize("strides", STRIDES)
def test_strides_match_the_oracle(strides: str) -> None:
    check(Case(several_tiles(), FRAMES, heads=2, head_dim=72, strides=strides), blocks=3)


@pytest.mark.parametrize("tile_size", [16, 64])
@pytest.mark.parametrize("mask", [SpacetimeMask.full(), WINDOW], ids=str)
def test_smaller_tiles_match_the_oracle(mask: SpacetimeMask, tile_size: int) -> None:
    layout = PackedLayout.from_grids([(3, 5, 6), (2, 2, 9)], capacity=130, tile_size=tile_size, order="tiled")
    check(Case(layout, mask, group=3))


def test_new_frames_attend_old_ones() -> None:
    grids, parts = [(4, 6, 8), (3, 4, 4), (2, 3, 3)], [[(3, 4), (0, 0), (1, 2)], [(0, 4), (0, 3), (0, 0)]]
    keep = [[frame_tokens(grid, *frames) for grid, frames in zip(grids, part, strict=True)] for part in parts]
    layout, keys = (PackedLayout.from_grids(grids, keep=kept, capacity=260, order="tiled") for kept in keep)
    check(Case(layout, WINDOW, keys, group=2))


def test_a_joint_layout_matches_the_oracle() -> None:
    text = PackedLayout.from_grids([(n, 1, 1) for n in (77, 0, 5, 37, 1)], capacity=130, max_segments=6)
    joint = JointLayout.build(text, several_tiles())
    for max_pairs in (None, 2):
        check(Case(joint.layout, WINDOW, group=2, max_pairs=max_pairs))


@pytest.mark.parametrize("capacity", [0, 5])
def test_no_text_at_all(capacity: int) -> None:
    text = PackedLayout.from_grids([], capacity=capacity, max_segments=6)
    check(Case(several_tiles(), kv_layout=text))


@pytest.mark.parametrize("mask", [SpacetimeMask.full(), TOKENS, WINDOW], ids=str)
def test_whatever_stands_in_other_segments_changes_no_bit(mask: SpacetimeMask) -> None:
    """NaN and outliers in all rows of every other segment, of q, k, v and the gradient of the output."""
    case = Case(several_tiles(), mask)
    segments, given = case.layout.segment_ids, upstream(case)
    clean = gradients(case, case.inputs(), given)
    for poison, parity in ((NAN, 0), (1e4, 1)):
        elsewhere = segments % 2 == parity
        qkv = [x.masked_fill(elsewhere[:, None, None], poison) for x in case.inputs()]
        poisoned = given[0].masked_fill(elsewhere[:, None, None], poison), given[1]
        found = gradients(case, qkv, poisoned, seed=parity)
        for ours, right in zip((found.q, found.k, found.v), (clean.q, clean.k, clean.v), strict=True):
            assert torch.equal(ours[~elsewhere], right[~elsewhere])


def test_bits_depend_neither_on_the_grid_nor_on_the_interleaving() -> None:
    case = Case(several_tiles(tile_size=64, order="tiled"), WINDOW, heads=2, group=2)
    qkv, given = case.inputs(), upstream(case)
    found = [gradients(case, qkv, given, seed=seed, blocks=1 + seed % 4) for seed in range(12)]
    assert len({one.trace for one in found}) == len(found)
    for one in found:
        assert all(
            torch.equal(a.view(torch.int16), b.view(torch.int16))
            for a, b in zip((one.q, one.k, one.v), (found[0].q, found[0].k, found[0].v), strict=True)
        )


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
def test_scales(scale: float) -> None:
    """Of 8, one key takes nearly all of the weight."""
    layout = PackedLayout.from_grids([(3, 8, 8), (2, 3, 5)], capacity=230)
    check(Case(layout, WINDOW, scale=scale, dtype=torch.float16))


def test_an_outlier_just_past_the_end_is_not_met() -> None:
    layout = PackedLayout.from_grids([(1, 1, 70), (1, 1, 3)])
    case = Case(layout)
    qkv, given = case.inputs(), upstream(case)
    for x in (*qkv, given[0]):
        x[70] = 40
    found = gradients(case, qkv, given)
    alone = replace(case, layout=PackedLayout.from_grids([(1, 1, 70)]))
    mine = replace(found, q=found.q[:70], k=found.k[:70], v=found.v[:70])
    compare(alone, [x[:70] for x in qkv], (given[0][:70], given[1][:, :70]), mine)
