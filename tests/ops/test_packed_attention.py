import importlib
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.cases import one_pass_backward
from sora_fast import use_backend
from sora_fast.kernels._launch import recording
from sora_fast.masks import SpacetimeMask
from sora_fast.ops import _attention_torch as plain
from sora_fast.ops.packed_attention import packed_attention
from sora_fast.packing import PackedLayout, frame_tokens
from sora_fast.proof.cases import slopes
from sora_fast.proof.rule import poisoned_scratch
from sora_fast.schedule import TileSchedule
from tests.helpers import assert_within_rule, examples
from tests.layouts import MASKS, packs, part_pairs
from tests.modulated import no_recompilation
from tests.tracing import LargestTensor, check_unasked

# The package gives this name to the function.
module = importlib.import_module("sora_fast.ops.packed_attention")

BACKENDS = ("torch", "triton")
# The interpreter computes products of bf16 wrongly; a GPU does not.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
FULL = SpacetimeMask.full()
WINDOW = SpacetimeMask.window(1, 1, 2)
NO_KEY_FOR_SOME = SpacetimeMask(t=(1, 2), h=(-3, -1))


@dataclass(frozen=True, eq=False)
class Case:
    """Random q, k, v and gradients of the results, NaN in the padding.

    heads: of k and v; q has `group` times as many. strides: how q, k, v lie in memory. one_pass: the backward form.
    """

    layout: PackedLayout
    mask: SpacetimeMask = WINDOW
    kv_layout: PackedLayout | None = None
    heads: int = 1
    group: int = 1
    head_dim: int = 24
    dtype: torch.dtype = torch.float32
    strides: str = "fused"
    with_lse: bool = True
    one_pass: bool = False

    @property
    def keys(self) -> PackedLayout:
        return self.kv_layout or self.layout

    def allowed(self) -> Tensor:
        """[N, Nk] bool."""
        return self.mask.materialize(self.layout, self.kv_layout)

    def inputs(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """q, k, v; the gradient of the output; that of the logsumexp [N, H]."""
        torch.manual_seed(0)
        padding = [layout.segment_ids < 0 for layout in (self.layout, self.keys, self.keys, self.layout)]
        heads = [self.heads * size for size in (self.group, 1, 1, self.group)]
        *qkv, grad_out = (
            _random(len(is_padding), count, self.head_dim, self.dtype, self.strides).masked_fill_(
                is_padding[:, None, None], float("nan")
            )
            for is_padding, count in zip(padding, heads, strict=True)
        )
        grad_lse = torch.randn(self.layout.capacity, heads[0]).masked_fill_(padding[0][:, None], float("nan"))
        return qkv, grad_out, grad_lse

    def results(self, backend: str, device: torch.device, *, mask: Any = None) -> list[Tensor]:
        """Output, gradients of q, k, v, and the logsumexp."""
        qkv, grad_out, grad_lse = self.inputs()
        q, k, v = (x.to(device).requires_grad_() for x in qkv)
        kv_layout = self.kv_layout and self.kv_layout.to(device)
        mask = mask or self.mask
        options = {"kv_layout": kv_layout, "deterministic": not self.one_pass, "backend": backend}
        out, lse = packed_attention(q, k, v, self.layout.to(device), mask, return_lse=True, **options)
        used = 2 if self.with_lse else 1
        given = (grad_out.to(device), grad_lse.to(lse))[:used]
        with one_pass_backward():
            grads = torch.autograd.grad((out, lse)[:used], (q, k, v), given)
        return [out.detach(), *grads, lse.detach()]

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        """The same, by one matrix of scores in `dtype`; 0 instead of a logsumexp of −inf."""
        qkv, grad_out, grad_lse = self.inputs()
        q, k, v, grad_out, grad_lse = (x.nan_to_num(0).to(dtype) for x in (*qkv, grad_out, grad_lse))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        allowed = self.allowed()
        some = allowed.any(dim=1)
        keys, values = (x.repeat_interleave(self.group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * self.head_dim**-0.5
        scores = scores.masked_fill(~allowed, float("-inf")).masked_fill(~some[:, None], 0)
        if not self.keys.capacity:
            return [torch.zeros_like(x) for x in (q, q, k, v, grad_lse)]
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1) * some[:, None], values)
        lse = (scores.logsumexp(-1) * some).mT
        loss = (out * grad_out).sum() + (lse * grad_lse).sum() * self.with_lse
        return [out.detach(), *torch.autograd.grad(loss, (q, k, v)), lse.detach()]

    def slopes(self) -> float:
        """Size of the terms that a gradient of q or k is summed from."""
        qkv, grad_out, _ = self.inputs()
        return slopes(*qkv, grad_out)

    def check(
        self, backend: str, device: torch.device, schedule: TileSchedule | None = None, *, poison: bool = True
    ) -> None:
        """The error rule for all results; exact zeros for padding and where no key is met.

        poison: fresh memory is NaN; Dynamo, which FlexAttention takes, cannot trace that.
        """
        with poisoned_scratch() if poison else nullcontext():
            *actual, lse = (x.cpu() for x in self.results(backend, device, mask=schedule))
        *expected, plain_lse = self.dense(self.dtype)
        *oracle, exact_lse = self.dense(torch.float64)
        names, terms = ("out", "grad_q", "grad_k", "grad_v"), (1.0, self.slopes(), self.slopes(), 1.0)
        for name, a, p, o, size in zip(names, actual, expected, oracle, terms, strict=True):
            assert_within_rule(a, p, o, name=name, terms=size)
        some = self.allowed().any(dim=1)
        assert (lse[~some] == float("-inf")).all()
        assert_within_rule(lse[some], plain_lse[some].to(lse.dtype), exact_lse[some], name="lse")
        for values, idle in zip(actual, (~some, ~some, *[~self.allowed().any(dim=0)] * 2), strict=True):
            assert (values[idle] == 0).all()


def _random(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, strides: str) -> Tensor:
    """[tokens, heads, head_dim] as one of three in a fused projection, or with heads, channels outermost, or tokens
    innermost."""
    if strides == "fused":
        return torch.randn(tokens, 3, heads, head_dim).to(dtype)[:, 1]
    if strides == "tokens":
        return torch.randn(head_dim, heads, tokens).to(dtype).permute(2, 1, 0)
    if strides == "heads":
        return torch.randn(heads, tokens, head_dim).to(dtype).transpose(0, 1)
    return torch.randn(head_dim, tokens, heads).to(dtype).permute(1, 2, 0)


def ragged(tile_size: int = 16, **options: Any) -> PackedLayout:
    """Segments of several tiles, of one token, of none; padding."""
    grids = [(2, 3, 5), (1, 1, 1), (0, 2, 2), (3, 2, 4), (1, 2, 2)]
    return PackedLayout.from_grids(grids, **{"capacity": 67, "max_segments": 6, "tile_size": tile_size, **options})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    # Of 16 bits only larger cases: over a handful of numbers the largest error of either side is chance.
    mask = draw(MASKS)
    return Case(draw(packs(mask=mask, max_grids=3)).layout, mask, **draw(FORMS))


FORMS = st.fixed_dictionaries(
    {
        "heads": st.integers(1, 2),
        "group": st.sampled_from([1, 1, 2, 3]),
        "head_dim": st.sampled_from([8, 20, 24, 40]),
        "strides": st.sampled_from(["fused", "heads", "channels", "tokens"]),
        "with_lse": st.booleans(),
        "one_pass": st.booleans(),
    }
)


@st.composite
def cross_cases(draw: st.DrawFn) -> Case:
    """Neighbours of equal lengths most of all, any of which may have nothing on one side or on both."""
    usual = st.sampled_from([2, 5, 20])
    lengths = [st.sampled_from([0, size, size, draw(usual)]) for size in (draw(usual), draw(usual))]
    sides = draw(st.lists(st.tuples(*lengths), max_size=7))
    layouts = [
        PackedLayout.from_grids(
            [(1, 1, length) for length in side],
            capacity=sum(side) + draw(st.integers(0, 5)),
            max_segments=max(1, len(sides)),
            tile_size=16,
        )
        for side in zip(*sides, strict=True)
    ] or [PackedLayout.from_grids([])] * 2
    return Case(layouts[0], FULL, kv_layout=layouts[1], **draw(FORMS))


@st.composite
def part_cases(draw: st.DrawFn) -> Case:
    """Queries and keys that are other parts of one grid, under any mask."""
    layout, keys = draw(part_pairs())
    return Case(layout, draw(MASKS), keys, **draw(FORMS))


@examples(40)
@given(case=part_cases())
def test_parts_of_one_grid_match_the_oracle_torch(case: Case, device: torch.device) -> None:
    case.check("torch", device)


@examples(5)
@given(case=part_cases())
def test_parts_of_one_grid_match_the_oracle_triton(case: Case, device: torch.device) -> None:
    case.check("triton", device)


def frames(layout_frames: list[tuple[int, int]], **options: Any) -> PackedLayout:
    """Some frames of each of four videos, of which one may be all or none."""
    grids = [(5, 3, 4), (3, 2, 2), (2, 3, 3), (9, 1, 1)]
    keep = [frame_tokens(grid, *part) for grid, part in zip(grids, layout_frames, strict=True)]
    return PackedLayout.from_grids(grids, keep=keep, max_segments=5, **options)


NEW = frames([(3, 5), (0, 0), (0, 2), (8, 9)], capacity=45, tile_size=16)
OLD = frames([(0, 5), (0, 3), (0, 0), (2, 9)], capacity=80, tile_size=32, order="tiled")


@pytest.mark.parametrize(
    ("backend", "mask"),
    [
        *(("torch", mask) for mask in (SpacetimeMask.frame_causal(), SpacetimeMask.token_causal(), WINDOW)),
        ("triton", SpacetimeMask.token_causal()),
        ("triton", SpacetimeMask.window(2, 1, 1, clamp=True)),
    ],
)
def test_new_frames_attend_old_ones(mask: SpacetimeMask, backend: str, device: torch.device) -> None:
    """A segment with old frames alone, one with new ones alone; tiles of other sizes; grouped heads; both forms."""
    Case(NEW, mask, OLD, group=2, one_pass=mask.causal_tokens).check(backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_one_grid_without_room_for_their_lists(backend: str, device: torch.device) -> None:
    mask = SpacetimeMask(h=(-1, 1), causal_tokens=True)
    schedule = TileSchedule.build(NEW.to(device), mask, kv_layout=OLD.to(device), max_pairs=2)
    with pytest.warns(RuntimeWarning, match="max_pairs is 2") if device.type == "cpu" else nullcontext():
        Case(NEW, mask, OLD).check(backend, device, schedule)


@examples(40)
@given(case=cases() | cross_cases())
def test_random_cases_match_the_oracle_torch(case: Case, device: torch.device) -> None:
    case.check("torch", device)


@examples(8)
@given(case=cases() | cross_cases())
def test_random_cases_match_the_oracle_triton(case: Case, device: torch.device) -> None:
    case.check("triton", device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "mask",
    [SpacetimeMask.full(), WINDOW, SpacetimeMask.frame_causal(), SpacetimeMask.token_causal(), NO_KEY_FOR_SOME],
)
def test_masks_match_the_oracle(mask: SpacetimeMask, backend: str, device: torch.device) -> None:
    Case(ragged(order="tiled"), mask).check(backend, device)


PAST = [SpacetimeMask.frame_causal(), SpacetimeMask.token_causal()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", PAST)
def test_the_past_in_raster_order_matches_the_oracle(mask: SpacetimeMask, backend: str, device: torch.device) -> None:
    """Ranges of tokens: tiles of several blocks and several frames, frames of several tiles, dropped tokens."""
    grids, keep = [(4, 3, 5), (2, 6, 7), (9, 1, 1)], [range(0, 60, 2), range(84), range(9)]
    layout = PackedLayout.from_grids(grids, capacity=130, max_segments=4, keep=[[*k] for k in keep], tile_size=32)
    Case(layout, mask, group=2, one_pass=backend == "triton").check(backend, device)


@pytest.mark.parametrize("one_pass", [False, True])
def test_the_past_in_whole_blocks_matches_the_oracle(one_pass: bool, device: torch.device) -> None:
    """Of 16 bits, whose blocks are as large as a GPU's; frames of more pairs than a call costs."""
    layout = PackedLayout.from_grids([(3, 9, 9), (1, 3, 3)], capacity=260)
    case = Case(layout, SpacetimeMask.frame_causal(), head_dim=72, dtype=torch.float16, one_pass=one_pass)
    for backend in BACKENDS if not one_pass else ["triton"]:
        case.check(backend, device)


@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 96, 104, 128, 192, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims_match_the_oracle(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    layout = PackedLayout.from_grids([(1, 4, 5)], capacity=21, tile_size=16)
    form = {"group": 2, "one_pass": dtype != torch.float32}
    Case(layout, SpacetimeMask.frame_causal(), head_dim=head_dim, dtype=dtype, **form).check("triton", device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("mask", "one_pass"), [(SpacetimeMask.window(1, 3, None), False), (SpacetimeMask.full(), True)]
)
def test_large_tiles_match_the_oracle(
    mask: SpacetimeMask, one_pass: bool, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    if dtype not in DTYPES and backend == "triton":
        pytest.skip("needs a CUDA device: the interpreter computes products of bf16 wrongly")
    grids = [(2, 9, 12), (3, 5, 7), (1, 4, 5)]
    layout = PackedLayout.from_grids(grids, order="tiled", for_mask=SpacetimeMask.window(1, 3, None), capacity=350)
    assert sorted(layout.tile_offsets.diff().tolist())[-4:] == [20, 105, 108, 108]
    Case(layout, mask, head_dim=72, dtype=dtype, one_pass=one_pass).check(backend, device)


@pytest.mark.parametrize("strides", ["fused", "heads", "channels", "tokens"])
def test_keys_with_gaps_between_them_of_any_strides(strides: str, device: torch.device) -> None:
    """A run of queries that meets tiles apart from each other, or a part of a tile: its keys are gathered."""
    mask = SpacetimeMask(w=(-3, -1), stride=(7, 3, 1))
    Case(PackedLayout.from_grids([(4, 5, 3)]), mask, heads=2, head_dim=8, strides=strides).check("torch", device)
    mask = SpacetimeMask.window(1, 1, 1)
    layout = PackedLayout.from_grids([(6, 6, 6)], order="tiled", for_mask=mask, tile_size=16)
    Case(layout, mask, heads=2, head_dim=8, strides=strides).check("torch", device)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_one_pass_with_scores_far_from_zero(sign: float, device: torch.device) -> None:
    """Rows past a tile's end have the score 0, whose weight would be infinite beside a logsumexp of -100."""
    layout = PackedLayout.from_grids([(1, 1, 21), (1, 1, 5)], tile_size=16)
    torch.manual_seed(0)
    q, k, v = (torch.randn(26, 1, 16, device=device) for _ in range(3))
    q[..., 0], k[..., 0] = 100, sign * 4
    grads = []
    for deterministic in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = packed_attention(*leaves, layout.to(device), deterministic=deterministic, backend="triton")
        with one_pass_backward():
            grads.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    for two_passes, one_pass in zip(*grads, strict=True):
        torch.testing.assert_close(one_pass, two_passes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_attention_matches_the_oracle(backend: str, device: torch.device) -> None:
    # Text of another number of tokens, an empty one, one for a video without tokens; tiles of another size.
    text = PackedLayout.from_grids([(n, 1, 1) for n in (3, 0, 5, 37, 1)], capacity=50, max_segments=6, tile_size=32)
    Case(ragged(), FULL, kv_layout=text, heads=2, group=2, one_pass=True).check(backend, device)


@pytest.mark.parametrize(("backend", "neighbours"), [("torch", 3), ("triton", 2)])
@pytest.mark.parametrize("with_lse", [False, True])
def test_every_pattern_of_empty_segments(with_lse: bool, backend: str, neighbours: int, device: torch.device) -> None:
    """Neighbours of equal lengths, of which any may lack its queries, its keys or both, in one pack."""
    segments = [side for pattern in product(product((0, 2), (0, 3)), repeat=neighbours) for side in pattern]
    queries, keys = (PackedLayout.from_grids([(1, 1, n) for n in side]) for side in zip(*segments, strict=True))
    Case(queries, FULL, kv_layout=keys, with_lse=with_lse).check(backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_text_at_all(backend: str, device: torch.device) -> None:
    text = PackedLayout.from_grids([], max_segments=6)
    Case(ragged(), FULL, kv_layout=text).check(backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [SpacetimeMask.full(), WINDOW, *PAST])
def test_empty_pack(mask: SpacetimeMask, backend: str, device: torch.device) -> None:
    out, *grads, lse = Case(PackedLayout.from_grids([]), mask).results(backend, device)
    assert out.shape == (0, 1, 24) and lse.shape == (0, 1) and all(grad.shape == out.shape for grad in grads)
    Case(PackedLayout.from_grids([(0, 2, 2)], capacity=5, max_segments=2), mask).check(backend, device)


@pytest.mark.parametrize(
    ("backend", "mask", "dtype"),
    [
        ("torch", SpacetimeMask.full(), torch.float32),
        ("torch", SpacetimeMask.full(), torch.bfloat16),
        ("torch", WINDOW, torch.float32),
        ("torch", WINDOW, torch.bfloat16),
        ("torch", SpacetimeMask.frame_causal(), torch.float32),
        ("torch", SpacetimeMask.token_causal(), torch.bfloat16),
        ("triton", SpacetimeMask.full(), torch.float16),
        ("triton", WINDOW, torch.float16),
        ("triton", SpacetimeMask.frame_causal(), torch.float16),
    ],
)
def test_a_sample_does_not_depend_on_the_others(
    backend: str, mask: SpacetimeMask, dtype: torch.dtype, device: torch.device
) -> None:
    mine, other = (2, 3, 4), (1, 3, 5)
    packs = [[mine], [other, mine, mine], [mine, (2, 4, 4), other]]
    results = []
    for grids in packs:
        layout = PackedLayout.from_grids(grids, capacity=80, max_segments=3, tile_size=16)
        start = layout.cu_seqlens[grids.index(mine)]
        case = Case(layout, mask, group=2, dtype=dtype)
        torch.manual_seed(0)
        q, k, v, grad_out = (torch.randn(24, heads, 24) for heads in (2, 1, 1, 2))
        places = slice(start, start + 24)
        inputs, all_grad_out, _ = case.inputs()
        for whole, part in zip((*inputs, all_grad_out), (q, k, v, grad_out), strict=True):
            whole[places] = part
        leaves = [x.to(device).requires_grad_() for x in inputs]
        out = packed_attention(*leaves, layout.to(device), mask, deterministic=True, backend=backend)
        results.append([x[places] for x in (out, *torch.autograd.grad(out, leaves, all_grad_out.to(device)))])
    for other_results in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other_results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mask", "order"), [(WINDOW, "tiled"), (SpacetimeMask.frame_causal(), "raster")])
def test_repeats_to_the_bit_and_takes_a_schedule(
    mask: SpacetimeMask, order: str, backend: str, device: torch.device
) -> None:
    case = Case(ragged(order=order), mask)
    schedule = TileSchedule.build(case.layout.to(device), case.mask)
    first, *others = (case.results(backend, device, mask=mask) for mask in (None, None, schedule))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("deterministic", "everywhere"), [(None, True), (True, False), (None, False), (False, True)])
def test_the_backward_form_obeys_deterministic(deterministic: bool | None, everywhere: bool) -> None:
    layout = ragged()
    q, k, v = (torch.randn(layout.capacity, 1, 24, requires_grad=True) for _ in range(3))
    torch.use_deterministic_algorithms(everywhere)
    try:
        with recording((9, 0)) as recorder, one_pass_backward():
            out = packed_attention(q, k, v, layout, deterministic=deterministic, backend="triton")
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    first = "grad_query" if deterministic or (deterministic is None and everywhere) else "statistics"
    names = [kernel.fn.__name__ for kernel, *_ in recorder.launches]
    assert names == [f"packed_attention_{name}_kernel" for name in ("forward", first, "grad_key_value")]


def test_keys_that_want_no_gradient_cost_nothing(device: torch.device) -> None:
    layout = ragged().to(device)
    qkv = [torch.randn(layout.capacity, 1, 24, device=device) for _ in range(3)]
    op = partial(packed_attention, layout=layout, mask=WINDOW, backend="triton")
    check_unasked(op, qkv, asked=1, spared="packed_attention_grad_key_value_kernel")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_that_is_short_of_room_matches_the_oracle(backend: str, device: torch.device) -> None:
    case = Case(ragged(order="tiled"))
    case.check(backend, device, TileSchedule.build(case.layout.to(device), case.mask, max_pairs=5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradient(backend: str, device: torch.device) -> None:
    layout = ragged().to(device)
    q, k, v = (torch.randn(layout.capacity, 1, 24, device=device, requires_grad=True) for _ in range(3))
    out = packed_attention(q, k, v, layout, WINDOW, backend=backend)
    expanded, given = (
        torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)
        for gradient in (torch.ones((), device=device).expand(out.shape), torch.ones_like(out))
    )
    assert all(torch.equal(a, b) for a, b in zip(expanded, given, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_logsumexp_of_nothing_is_a_constant(backend: str, device: torch.device) -> None:
    """Two such merged by logaddexp give NaN back, which no gradient may take over."""
    layout = ragged().to(device)
    qkv = [torch.randn(layout.capacity, 1, 24, device=device, requires_grad=True) for _ in range(3)]
    results = []
    for merged in (False, True):
        _, lse = packed_attention(*qkv, layout, NO_KEY_FOR_SOME, return_lse=True, backend=backend)
        empty = lse == float("-inf")
        assert 0 < empty[layout.segment_ids >= 0].sum() < empty.numel()
        lse = torch.logaddexp(lse, torch.full_like(lse, float("-inf"))) if merged else lse
        results.append(torch.autograd.grad(lse.masked_fill(empty, 0).sum(), qkv))
    for plainly, by_merging in zip(*results, strict=True):
        torch.testing.assert_close(by_merging, plainly)


@pytest.mark.parametrize("scale", [0.2, 0.0, -0.2])
def test_scale(scale: float, device: torch.device) -> None:
    layout = ragged().to(device)
    qkv = [torch.randn(layout.capacity, 1, 24, device=device, requires_grad=True) for _ in range(3)]
    results = []
    for backend, factor in (("torch", 1), ("torch", 2), ("triton", 2)):
        q, k, v = qkv
        out = packed_attention(factor * q, k, v, layout, WINDOW, scale=scale / factor, backend=backend)
        results.append((out, *torch.autograd.grad(out, qkv, torch.ones_like(out))))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_strides_past_32_bits(tmp_path: Path) -> None:
    # A sparse file: only the pages that are touched exist.
    layout = PackedLayout.from_grids([(1, 3, 6)], tile_size=16)
    stride = 1 << 28
    file = torch.from_file(str(tmp_path / "far"), shared=True, size=layout.capacity * stride, dtype=torch.float16)
    near = [torch.randn(layout.capacity, heads, 16).half() for heads in (2, 1, 1, 2)]
    far = [file.as_strided(x.shape, (stride, stride // 2, 1), 32 * i).copy_(x) for i, x in enumerate(near)]
    results = []
    for *qkv, grad_out in (near, far):
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = packed_attention(*leaves, layout, deterministic=True, backend="triton")
        results.append((out, *torch.autograd.grad(out, leaves, grad_out)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mask", [SpacetimeMask.full(), SpacetimeMask.window(1, 2, 2), SpacetimeMask.temporal()])
@pytest.mark.parametrize("with_lse", [False, True])
def test_torch_backend_builds_no_matrix_over_the_pack(mask: SpacetimeMask, with_lse: bool) -> None:
    layout = PackedLayout.from_grids([(4, 8, 8)] * 8, order="tiled", for_mask=mask)
    qkv = [torch.randn(layout.capacity, 1, 8) for _ in range(3)]
    schedule = TileSchedule.build(layout, mask)

    def blocks() -> Any:
        return module._blocks(module._tensors(schedule), module._kind(schedule), join=not with_lse)

    with LargestTensor() as largest:
        out, lse = plain.forward(*qkv, blocks(), 0.3)
        plain.backward(out, lse if with_lse else None, *qkv, out, lse, blocks(), 0.3)
    assert largest.elements < layout.capacity**2 / 8


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("mask", [SpacetimeMask.full(), WINDOW])
def test_gradcheck(mask: SpacetimeMask, with_lse: bool) -> None:
    layout = PackedLayout.from_grids([(2, 2, 2), (1, 3, 1), (1, 3, 1)], tile_size=16)
    qkv = [torch.randn(layout.capacity, heads, 3, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)]

    def call(*qkv: Tensor) -> Any:
        return packed_attention(*qkv, layout, mask, return_lse=with_lse)

    assert torch.autograd.gradcheck(call, qkv)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strides", ["fused", "channels"])
def test_opcheck(strides: str, backend: str, device: torch.device) -> None:
    layout = PackedLayout.from_grids([(1, 3, 4), (1, 1, 2)], capacity=16, tile_size=16, device=device)
    q, k, v, grad_out = (_random(16, heads, 16, torch.float32, strides).to(device) for heads in (2, 1, 1, 2))
    schedule = TileSchedule.build(layout, WINDOW)
    tensors, options = module._tensors(schedule), ([16, 16], module._kind(schedule), 0.25, False)
    op, op_backward = {
        "torch": (module._plain_attention, module._plain_attention_backward),
        "triton": (module._triton_attention, module._triton_attention_backward),
    }[backend]
    out, lse = op(q, k, v, tensors, *options)
    kept = (q, k, v, out, lse, tensors, *options)
    torch.library.opcheck(op_backward.registered, (grad_out, torch.rand_like(lse), *kept, True))
    torch.library.opcheck(op_backward.registered, (grad_out, None, *kept, False))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    torch.library.opcheck(op.registered, (q, k, v, tensors, *options))


@pytest.mark.parametrize(
    ("backend", "compiler", "batches"),
    [("torch", "inductor", 2), ("torch", "aot_eager", 20), ("triton", "aot_eager", 20)],
)
def test_compiles_once_for_ragged_batches(backend: str, compiler: str, batches: int, device: torch.device) -> None:
    def call(x: Tensor, layout: PackedLayout, schedule: TileSchedule, text: PackedLayout) -> Tensor:
        q, k, v = x.split((2, 1, 1), dim=1)
        x = packed_attention(q, k, v, layout, schedule, deterministic=False, backend=backend)
        x = packed_attention(x, k, v, layout, SpacetimeMask.spatial(), backend=backend)
        return packed_attention(x, k[:9], v[:9], layout, kv_layout=text, backend=backend)

    generator = torch.Generator().manual_seed(0)

    def grid() -> tuple[int, int, int]:
        return tuple(torch.randint(1, 4, (3,), generator=generator).tolist())

    with no_recompilation():
        compiled = torch.compile(call, fullgraph=True, backend=compiler)
        for batch, count in enumerate(torch.randint(0, 3, (batches,), generator=generator).tolist()):
            sizes = {"capacity": 60, "max_segments": 3, "tile_size": 16, "device": device}
            layout = PackedLayout.from_grids([grid() for _ in range(count)], order="tiled", **sizes)
            lengths = [(n, 1, 1) for n in (3, 0, 5)[: count + 1]]
            text = PackedLayout.from_grids(lengths, **{**sizes, "capacity": 9})
            schedule = TileSchedule.build(layout, WINDOW)
            x = torch.randn(60, 4, 16, generator=generator).to(device).requires_grad_()
            results = []
            # Interpreted kernels take seconds a batch: after two, launches are noted, and only graphs are compared.
            noted = recording((9, 0)) if backend == "triton" and batch > 1 and device.type == "cpu" else nullcontext()
            with noted:
                for function in (compiled, call):
                    out = function(x, layout, schedule, text)
                    results.append((out, *torch.autograd.grad(out, x, torch.ones_like(out))))
            if not isinstance(noted, nullcontext):
                continue
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [SpacetimeMask.full(), WINDOW, *PAST])
def test_the_host_never_waits(mask: SpacetimeMask) -> None:
    """From the layout to the gradients: a schedule built, refreshed, and attention under it."""
    sizes = {"capacity": 200, "max_segments": 3}
    first, second = (PackedLayout.from_grids(g, **sizes).to("cuda") for g in ([(3, 4, 5)], [(2, 8, 8)]))
    qkv = torch.randn(3, 200, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> Tensor:
        schedule = TileSchedule.build(first, mask).refresh_(second)
        out = packed_attention(*qkv.unbind(), first, schedule, backend="triton")
        return torch.autograd.grad(out, qkv, torch.ones_like(out))[0]

    with use_backend("triton"):
        expected = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(actual, expected)


LAYOUT = PackedLayout.from_grids([(1, 2, 3)], capacity=8)
TEXT = PackedLayout.from_grids([(5, 1, 1)])
OTHER = PackedLayout.from_grids([(1, 2, 2)], capacity=8)
ROOMY = PackedLayout.from_grids([(1, 2, 3)], capacity=8, max_segments=2)
SMALL_TILES = PackedLayout.from_grids([(1, 2, 3)], capacity=8, tile_size=16)
CROSS = TileSchedule.build(LAYOUT, kv_layout=TEXT)
CROSS_ALIKE = TileSchedule.build(LAYOUT, kv_layout=PackedLayout.from_grids([(1, 3, 2)], capacity=8))
X = torch.zeros(8, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], X, X, LAYOUT), {}, ValueError, r"q: shape \(2, 16\); it must be \[8, H, D\]"),
        ((X[:7], X, X, LAYOUT), {}, ValueError, r"q: shape \(7, 2, 16\); it must be \[8, H, D\]"),
        ((None, X, X, LAYOUT), {}, TypeError, r"q: NoneType; it must be a tensor"),
        ((X.int(), X, X, LAYOUT), {}, TypeError, "q: int32; it must be float16 or"),
        ((X, X[:7], X, LAYOUT), {}, ValueError, r"k: shape \(7, 2, 16\); it must be \[8, Hk, 16\]"),
        ((X[:, [0, 1, 0]], X, X, LAYOUT), {}, ValueError, "k: 2 heads; their number must divide the 3 heads of q"),
        ((X, X[:, :0], X[:, :0], LAYOUT), {}, ValueError, "k: 0 heads; their number must divide the 2 heads of q"),
        ((X, X, X[:, :1], LAYOUT), {}, ValueError, r"v: shape \(8, 1, 16\); it must be \[8, 2, 16\]"),
        ((X, X, X[:, :, :8], LAYOUT), {}, ValueError, r"v: shape \(8, 2, 8\); it must be \[8, 2, 16\]"),
        ((X, X.half(), X, LAYOUT), {}, TypeError, "k: float16; it must be float32"),
        ((X, X, X.to("meta"), LAYOUT), {}, ValueError, "v: on meta, but q is on cpu"),
        ((X[:, :0], X[:, :0], X[:, :0], LAYOUT), {}, ValueError, r"q: shape \(8, 0, 16\); .* at least one head"),
        ((X, X, X, LAYOUT), {"kv_layout": TEXT}, ValueError, r"k: shape \(8, 2, 16\); it must be \[5, Hk, 16\]"),
        (
            (X, X[:5], X[:5], LAYOUT, WINDOW),
            {"kv_layout": TEXT},
            ValueError,
            r"kv_layout: segment 0 has the grid \(5, 1, 1\), but \(1, 2, 3\) in the layout; under a mask",
        ),
        ((X, X, X, LAYOUT, "full"), {}, TypeError, "mask: str; it must be a SpacetimeMask, a TileSchedule or None"),
        (
            (X, X, X, LAYOUT, TileSchedule.build(TEXT)),
            {},
            ValueError,
            "a schedule for a layout of capacity 5, but .* 8",
        ),
        ((X, X, X, LAYOUT, TileSchedule.build(ROOMY)), {}, ValueError, "a layout of max_segments 2, but .* has 1"),
        ((X, X, X, LAYOUT, TileSchedule.build(SMALL_TILES)), {}, ValueError, "a layout of max_tiles 2, but .* has 1"),
        ((X, X, X, LAYOUT, TileSchedule.build(OTHER)), {}, ValueError, "mask: a schedule of another batch"),
        ((X, X, X, LAYOUT, CROSS), {}, ValueError, "a schedule for a layout of capacity 5, but .* 8"),
        (
            (X, X, X, LAYOUT, TileSchedule.build(LAYOUT, WINDOW)),
            {"kv_layout": LAYOUT},
            ValueError,
            "mask: a schedule of self-attention with kv_layout",
        ),
        ((X, X, X, LAYOUT, CROSS_ALIKE), {}, ValueError, "mask: a schedule of cross-attention without kv_layout"),
        (
            (X, X, X, LAYOUT, TileSchedule.build(LAYOUT)),
            {"kv_layout": LAYOUT},
            ValueError,
            "mask: a schedule of self-attention with kv_layout",
        ),
        ((X, X, X, LAYOUT), {"scale": float("nan")}, ValueError, "scale: nan; it must be a finite number"),
        ((X, X, X, LAYOUT), {"backend": "cuda"}, ValueError, "backend: 'cuda' cannot run packed_attention"),
        ((X.double(),) * 3 + (LAYOUT,), {"backend": "triton"}, ValueError, "backend: 'triton' cannot run"),
    ],
)
def test_bad_input_is_named(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        packed_attention(*arguments, **options)
