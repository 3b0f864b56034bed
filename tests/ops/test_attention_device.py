"""The torch backend of attention as it is on a GPU, on a CPU: FlexAttention uncompiled, and varlen by a stand-in."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.ops import _attention_device as on_device
from sora_fast.ops import packed_attention
from sora_fast.packing import JointLayout, PackedLayout, frame_tokens
from sora_fast.schedule import TileSchedule
from tests.helpers import examples
from tests.modulated import no_recompilation
from tests.ops.test_attention_peers import LAYOUT, TEXT, TILED, dense, unwritten
from tests.ops.test_packed_attention import NO_KEY_FOR_SOME, PAST, WINDOW, Case, cases, cross_cases, ragged


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use_flex(monkeypatch)


def use_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's dense formulas, forward and backward, which it has for every device but lets nobody use."""
    import torch.nn.attention.flex_attention as module

    monkeypatch.setattr(on_device, "fits", lambda q, k: q.shape[0] > 0 and k.shape[0] > 0)
    monkeypatch.setattr(on_device, "_compiled_flex", lambda *kind: module.flex_attention)
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    torch._dynamo.reset()  # it traces itself for every shape, and gives up after some


CPU = torch.device("cpu")


@pytest.mark.parametrize("mask", [SpacetimeMask.full(), WINDOW, *PAST, NO_KEY_FOR_SOME, SpacetimeMask.spatial()])
@pytest.mark.parametrize("order", ["raster", "tiled"])
def test_masks_match_the_oracle(mask: SpacetimeMask, order: str, on_cpu: None) -> None:
    Case(ragged(order=order), mask, heads=2, group=2).check("torch", CPU, poison=False)


def test_cross_attention_matches_the_oracle(on_cpu: None) -> None:
    text = PackedLayout.from_grids([(n, 1, 1) for n in (3, 0, 5, 37, 1)], capacity=50, max_segments=6, tile_size=32)
    Case(ragged(), SpacetimeMask.full(), kv_layout=text, heads=2, group=2).check("torch", CPU, poison=False)


@pytest.mark.parametrize("mask", [WINDOW, SpacetimeMask.token_causal()])
def test_parts_of_one_grid_match_the_oracle(mask: SpacetimeMask, on_cpu: None) -> None:
    grids, frames = [(5, 5, 6), (3, 2, 2)], [[(2, 5), (0, 3)], [(0, 5), (0, 2)]]
    keep = [[frame_tokens(grid, *part) for grid, part in zip(grids, side, strict=True)] for side in frames]
    layout, keys = (PackedLayout.from_grids(grids, keep=kept, capacity=170) for kept in keep)
    Case(layout, mask, keys, heads=2, group=2).check("torch", CPU, poison=False)


@pytest.mark.parametrize("mask", [WINDOW, SpacetimeMask.token_causal(), SpacetimeMask.full()])
def test_joint_layouts_match_the_oracle(mask: SpacetimeMask, on_cpu: None) -> None:
    """Its blocks hold texts and videos of several segments."""
    text = PackedLayout.from_grids([(n, 1, 1) for n in (3, 0, 5, 37, 1)], capacity=50, max_segments=6)
    joint = JointLayout.build(text, ragged(order="tiled"), text_first=False)
    Case(joint.layout, mask, heads=2, group=2).check("torch", CPU, poison=False)


def test_several_of_its_blocks_match_the_oracle(on_cpu: None) -> None:
    grids = [(4, 7, 9), (1, 5, 5), (3, 4, 4)]
    layout = PackedLayout.from_grids(grids, order="tiled", for_mask=WINDOW, capacity=390, max_segments=5)
    Case(layout, WINDOW, head_dim=8).check("torch", CPU, poison=False)


@examples(12)
@given(case=cases() | cross_cases())
def test_random_cases_match_the_oracle(case: Case) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_flex(monkeypatch)
        case.check("torch", CPU, poison=False)


def test_a_logsumexp_of_nothing_is_a_constant(on_cpu: None) -> None:
    layout = ragged()
    qkv = [torch.randn(layout.capacity, 1, 24, requires_grad=True) for _ in range(3)]
    _, lse = packed_attention(*qkv, layout, NO_KEY_FOR_SOME, return_lse=True, backend="torch")
    empty = lse == -math.inf
    merged = torch.logaddexp(lse, torch.full_like(lse, -math.inf)).masked_fill(empty, 0).sum()
    plainly = lse.masked_fill(empty, 0).sum()
    for a, b in zip(
        torch.autograd.grad(merged, qkv, retain_graph=True), torch.autograd.grad(plainly, qkv), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_it_compiles_once_for_ragged_batches(on_cpu: None) -> None:
    def call(x: Tensor, layout: PackedLayout) -> Tensor:
        return packed_attention(*x.unbind(1), layout, WINDOW, backend="torch").square().sum()

    with no_recompilation():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for grids in ([(2, 3, 5), (1, 4, 4)], [(1, 1, 1)], [(3, 2, 4), (0, 1, 1), (2, 2, 2)]):
            layout = PackedLayout.from_grids(grids, order="tiled", capacity=50, max_segments=3, tile_size=16)
            x = torch.randn(50, 3, 2, 16, requires_grad=True)
            results = [torch.autograd.grad(run(x, layout), x) for run in (compiled, call)]
            torch.testing.assert_close(*results)


def test_no_number_of_kinds_is_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo gives up after eight graphs of a code object, and FlexAttention then makes all scores, without a word."""
    compiled = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(on_device, "fits", lambda q, k: True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    on_device._compiled_flex.cache_clear()
    with torch.no_grad():
        for _ in range(2):
            for heads in range(1, 13):
                layout = PackedLayout.from_grids([(2, 3, 5)], capacity=40)
                qkv = [torch.randn(40, heads, 16) for _ in range(3)]
                packed_attention(*qkv, layout, WINDOW, backend="torch")
    assert len(compiled) == 12
    on_device._compiled_flex.cache_clear()


@pytest.mark.parametrize("mask", [SpacetimeMask.full(), SpacetimeMask.token_causal()])
def test_varlen_compiles_in_one_graph(mask: SpacetimeMask, monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(q: Tensor, k: Tensor, v: Tensor, *sizes: Any, scale: float, window_size: Any = (-1, -1)) -> Tensor:
        return q * scale + (k + v).sum(0) * sizes[0].sum()

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    monkeypatch.setattr(on_device, "fits", lambda q, k: True)
    monkeypatch.setattr(on_device, "has_varlen", lambda *_: True)
    monkeypatch.setattr(on_device, "varlen_options", lambda device: ("scale", "window_size"))

    def call(x: Tensor, layout: PackedLayout) -> Tensor:
        return packed_attention(*x.unbind(1), layout, mask, backend="torch")

    with no_recompilation():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for grids in ([(2, 3, 5), (1, 4, 4)], [(1, 1, 1)]):
            layout = PackedLayout.from_grids(grids, capacity=50, max_segments=3, tile_size=16)
            x = torch.randn(50, 3, 2, 16)
            torch.testing.assert_close(compiled(x, layout), call(x, layout))


# varlen, by what its documentation says. It leaves memory past the last segment as it was.


def varlen_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size in ((-1, -1), (-1, 0))
    return attend(query, key, value, (cu_seq_q, cu_seq_k, max_q, max_k), scale, causal=window_size[1] == 0)


def varlen_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> Tensor:
    assert query.shape[1] == key.shape[1]
    return attend(query, key, value, (cu_seq_q, cu_seq_k, max_q, max_k), query.shape[2] ** -0.5, causal=is_causal)


def attend(
    q: Tensor, k: Tensor, v: Tensor, sizes: tuple[Tensor, Tensor, int, int], scale: float | None, *, causal: bool
) -> Tensor:
    assert scale is not None and sizes[2:] == (len(q), len(k)), "what bounds every length, and is no host read"
    starts, key_starts = (offsets.tolist() for offsets in sizes[:2])
    for x, end in ((q, starts[-1]), (k, key_starts[-1]), (v, key_starts[-1])):
        if x.requires_grad:
            x.register_hook(partial(unwritten, end=end))
    parts = [
        dense(q[start:end], k[first:last], v[first:last], scale, causal=causal)
        for start, end, first, last in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False)
    ]
    return unwritten(torch.cat([*parts, q[starts[-1] :]]), starts[-1])


@pytest.mark.parametrize("function", [varlen_2_13, varlen_2_10])
@pytest.mark.parametrize(
    ("layout", "mask", "kv_layout"),
    [
        (LAYOUT, SpacetimeMask.full(), None),
        (LAYOUT, SpacetimeMask.token_causal(), None),
        (TILED, SpacetimeMask.token_causal(), None),
        (LAYOUT, SpacetimeMask.full(), TEXT),
    ],
)
def test_varlen(
    function: Callable[..., Tensor],
    layout: PackedLayout,
    mask: SpacetimeMask,
    kv_layout: PackedLayout | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = kv_layout or layout
    inputs = [torch.randn(own.capacity, heads, 8) for own, heads in ((layout, 4), (keys, 2), (keys, 2))]
    for x, own in zip(inputs, (layout, keys, keys), strict=True):
        x[own.segment_ids < 0] = math.nan
    gradient = torch.randn(inputs[0].shape)
    gradient[layout.segment_ids < 0] = math.nan
    qkv = [x.requires_grad_() for x in inputs]

    def run() -> list[Tensor]:
        out = packed_attention(*qkv, layout, mask, kv_layout=kv_layout, scale=0.3, backend="torch")
        return [out, *torch.autograd.grad(out, qkv, gradient)]

    expected = run()
    monkeypatch.setattr(on_device, "fits", lambda q, k: True)
    monkeypatch.setattr(on_device, "has_varlen", lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(on_device, "varlen_options", on_device.varlen_options.__wrapped__)
    for a, b in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("dtype", "mask", "deterministic", "capability", "expected"),
    [
        (torch.bfloat16, SpacetimeMask.full(), None, (9, 0), True),
        (torch.float16, SpacetimeMask.token_causal(), False, (8, 0), True),
        (torch.bfloat16, SpacetimeMask.full(), True, (9, 0), False),
        (torch.float32, SpacetimeMask.full(), None, (9, 0), False),
        (torch.bfloat16, SpacetimeMask.full(), None, (7, 5), False),
        (torch.bfloat16, WINDOW, None, (9, 0), False),
        (torch.bfloat16, SpacetimeMask.frame_causal(), None, (9, 0), False),
    ],
)
def test_where_varlen_is_taken(
    dtype: torch.dtype,
    mask: SpacetimeMask,
    deterministic: bool | None,
    capability: tuple[int, int],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnGpu:
        is_cuda, shape, device = True, (61, 2, 64), torch.device("cuda:0")

    query: Any = OnGpu()
    query.dtype = dtype
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(on_device, "varlen_options", on_device.varlen_options.__wrapped__)
    schedule = TileSchedule.build(LAYOUT, mask)
    assert on_device.has_varlen(query, schedule, deterministic) == expected
    query.shape = (61, 2, 264)
    assert not on_device.has_varlen(query, schedule, deterministic)
