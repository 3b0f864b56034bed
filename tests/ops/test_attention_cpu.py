"""The compiled kernel for CPUs: what it takes matches the oracle, on any vectors and any number of threads."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_fast import explain
from sora_fast.masks import SpacetimeMask
from sora_fast.ops import _attention_cpu, _library, packed_attention
from sora_fast.packing import PackedLayout
from tests.helpers import examples
from tests.layouts import packs
from tests.ops.test_packed_attention import FORMS, NO_KEY_FOR_SOME, WINDOW, Case, cross_cases, ragged

pytestmark = pytest.mark.skipif(_library.missing("cpu") is not None, reason=f"{_library.missing('cpu')}")
CPU = torch.device("cpu")
MASKS = (SpacetimeMask.full(), SpacetimeMask.frame_causal())
# Longer than a task's queries, and than the keys that it holds at a time, by one and by a part of a vector.
LONG = [(1, 257, 1), (3, 9, 11), (1, 193, 1), (1, 1, 1)]


@pytest.fixture(params=[0, 8, 4])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Numbers a vector: all that the processor has, as in AVX2, as in SSE."""
    monkeypatch.setattr(_attention_cpu, "_LANES", request.param)
    return request.param


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layout = draw(packs(max_grids=3)).layout
    return Case(layout, draw(st.sampled_from(MASKS if layout.is_raster else MASKS[:1])), **draw(FORMS))


@examples(40)
@given(case=cases() | cross_cases())
def test_random_cases_match_the_oracle(case: Case) -> None:
    case.check("cpu", CPU)


@pytest.mark.parametrize("head_dim", [1, 32, 72, 128, 130])
@pytest.mark.parametrize("mask", MASKS)
def test_long_segments_match_the_oracle(mask: SpacetimeMask, head_dim: int, lanes: int) -> None:
    Case(PackedLayout.from_grids(LONG, capacity=760), mask, group=2, head_dim=head_dim).check("cpu", CPU)


@pytest.mark.parametrize("with_lse", [False, True])
def test_texts_of_other_lengths_match_the_oracle(with_lse: bool, lanes: int) -> None:
    text = PackedLayout.from_grids([(1, n, 1) for n in (3, 0, 300, 37, 1)], capacity=350, max_segments=6)
    Case(ragged(), MASKS[0], kv_layout=text, heads=2, group=2, with_lse=with_lse).check("cpu", CPU)


@pytest.mark.parametrize("mask", MASKS)
def test_a_result_depends_on_no_neighbour_and_no_thread(mask: SpacetimeMask) -> None:
    mine, first = (3, 9, 11), 257
    alone = Case(PackedLayout.from_grids([mine]), mask, heads=2, head_dim=40)
    among = Case(PackedLayout.from_grids(LONG, capacity=760), mask, heads=2, head_dim=40)
    torch.manual_seed(0)
    own = [torch.randn(297, 2, 40) for _ in range(4)]
    results = []
    threads = torch.get_num_threads()
    try:
        for case, start, count in ((alone, 0, 1), (among, first, 1), (among, first, 2)):
            torch.set_num_threads(count)
            qkv, grad_out, _ = case.inputs()
            for whole, part in zip((*qkv, grad_out), own, strict=True):
                whole[start : start + 297] = part
            leaves = [x.requires_grad_() for x in qkv]
            out = packed_attention(*leaves, case.layout, mask, backend="cpu")
            results.append([x[start : start + 297] for x in (out, *torch.autograd.grad(out, leaves, grad_out))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_frames_of_one_segment_add_to_its_keys_in_one_order() -> None:
    """A single head, so that threads meet at the same keys if a segment's frames are not one's alone."""
    layout = PackedLayout.from_grids([(12, 5, 8)])
    torch.manual_seed(0)
    qkv = [torch.randn(480, 1, 64, requires_grad=True) for _ in range(3)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 4, 4, 4):
            torch.set_num_threads(count)
            out = packed_attention(*qkv, layout, SpacetimeMask.frame_causal(), backend="cpu")
            results.append(torch.autograd.grad(out.square().sum(), qkv))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.3])
def test_scale(scale: float, lanes: int) -> None:
    layout = ragged()
    qkv = [torch.randn(layout.capacity, 1, 24, requires_grad=True) for _ in range(3)]
    results = []
    for backend in ("torch", "cpu"):
        out = packed_attention(*qkv, layout, scale=scale, backend=backend)
        results.append((out, *torch.autograd.grad(out, qkv, torch.ones_like(out))))
    torch.testing.assert_close(results[1], results[0])


def test_scores_far_from_zero(lanes: int) -> None:
    """Weights below what a float can hold become 0, and a not-a-number stays in its own row."""
    layout = PackedLayout.from_grids([(1, 40, 1), (1, 5, 1)])
    q, k, v = (torch.randn(45, 1, 16) for _ in range(3))
    q[:, :, 0], k[:, :, 0] = 100, torch.linspace(-50, 50, 45)[:, None]
    q[7] = float("nan")
    out, lse = packed_attention(q, k, v, layout, return_lse=True, backend="cpu")
    expected, sums = packed_attention(q.double(), k.double(), v.double(), layout, return_lse=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert out.isnan().any(dim=(1, 2)).nonzero().tolist() == [[7]]


@pytest.mark.parametrize("hidden", [slice(0, 256), slice(0, 300), slice(256, 400)])
def test_scores_of_minus_infinity_have_no_weight(hidden: slice, lanes: int) -> None:
    """Also where all keys that are held at a time have none, and keys with finite scores follow."""
    layout = PackedLayout.from_grids([(1, 400, 1)])
    q, k, v = (torch.randn(400, 1, 16) for _ in range(3))
    q[:, :, 0], k[hidden, :, 0] = 1, -float("inf")
    out, lse = packed_attention(q, k, v, layout, return_lse=True, backend="cpu")
    scores = (q[:, 0].double() @ k[:, 0].double().mT) / 4
    torch.testing.assert_close(out[:, 0].double(), scores.softmax(-1) @ v[:, 0].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[:, 0].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("swapped", [False, True])
def test_every_tensor_may_lie_in_its_own_way(swapped: bool, lanes: int) -> None:
    """Rows of a fused projection, heads outermost, tokens that are all one: each tensor in another way."""
    layout = ragged()
    fused = torch.randn(layout.capacity, 3, 2, 24)[:, 1]
    by_heads = torch.randn(2, layout.capacity, 24).transpose(0, 1)
    repeated = torch.randn(1, 2, 24).expand(layout.capacity, 2, 24)
    tensors = [fused, by_heads, repeated, torch.randn(24, layout.capacity, 2).permute(1, 2, 0)]
    q, k, v, grad_out = tensors[::-1] if swapped else tensors
    results = []
    for move in (lambda x: x, torch.Tensor.double):
        leaves = [move(x).detach().requires_grad_() for x in (q, k, v)]
        out = packed_attention(*leaves, layout, backend="cpu" if not results else "torch")
        grads = torch.autograd.grad(out, leaves, move(grad_out))
        results.append([x.float() for x in (out.detach(), *grads)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_it_is_chosen_where_it_can_be_and_the_reason_is_told_where_not() -> None:
    layout = ragged()
    qkv = [torch.randn(layout.capacity, 1, 24) for _ in range(3)]
    packed_attention(*qkv, layout)
    assert "packed_attention: cpu" in explain()
    for inputs, mask, reason in (
        (qkv, WINDOW, "the full mask and the frame-causal one"),
        (qkv, NO_KEY_FOR_SOME, "the full mask and the frame-causal one"),
        ([x.bfloat16() for x in qkv], None, "float32, not torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=f"backend: 'cpu' cannot run packed_attention here: .*{reason}"):
            packed_attention(*inputs, layout, mask, backend="cpu")
        packed_attention(*inputs, layout, mask)
        assert reason in explain()
