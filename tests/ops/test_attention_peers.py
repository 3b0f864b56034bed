"""The optional backends, with modules in their place that note the call and compute what the libraries document."""

import importlib.util
import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import sora_fast
from sora_fast.masks import SpacetimeMask
from sora_fast.ops import _attention_peers as peers
from sora_fast.ops import packed_attention
from sora_fast.packing import JointLayout, PackedLayout
from sora_fast.schedule import TileSchedule
from tests.modulated import no_recompilation

LAYOUT = PackedLayout.from_grids(
    [(2, 3, 5), (0, 1, 1), (1, 1, 1), (3, 2, 4)], capacity=61, max_segments=5, tile_size=16
)
TILED = PackedLayout.from_grids(
    [(2, 3, 5), (3, 4, 4)], order="tiled", box=(2, 2, 2), capacity=80, max_segments=3, tile_size=16
)
TEXT = PackedLayout.from_grids([(7, 1, 1), (3, 1, 1), (0, 1, 1), (2, 1, 1)], capacity=15, max_segments=5, tile_size=16)
MASKS = [SpacetimeMask.full(), SpacetimeMask.token_causal()]


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Tensor:
    """[L, H, D]; causal: aligned to the bottom right corner; zeros where no key is left."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    allowed = torch.ones(len(q), len(k), dtype=torch.bool)
    allowed = allowed.tril(len(k) - len(q)) if causal else allowed
    scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~allowed, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(0), v)


class FlashAttn(ModuleType):
    """flash_attn/flash_attn_interface.py; past the last segment, it leaves memory as it was, gradients too: NaN."""

    def flash_attn_varlen_func(self, q: Tensor, k: Tensor, v: Tensor, *sizes: Any, **options: Any) -> Tensor:
        self.sizes, self.options = sizes, options
        starts, key_starts = (offsets.tolist() for offsets in sizes[:2])
        for x, end in ((q, starts[-1]), (k, key_starts[-1]), (v, key_starts[-1])):
            if x.requires_grad:
                x.register_hook(partial(unwritten, end=end))
        parts = []
        for start, end, first, last in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
            part = (q[start:end], k[first:last], v[first:last])
            parts.append(dense(*part, options["softmax_scale"], causal=options["causal"]))
        return unwritten(torch.cat([*parts, q[starts[-1] :]]), starts[-1])


def unwritten(x: Tensor, end: int) -> Tensor:
    """The tensor, but NaN from row `end` on."""
    return torch.where((torch.arange(len(x)) < end)[:, None, None], x, float("nan"))


class BlockDiagonalMask:
    """xformers/ops/fmha/attn_bias.py."""

    causal = False

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int]) -> "BlockDiagonalMask":
        mask = cls()
        mask.lengths = q_seqlen
        return mask

    def make_causal(self) -> "BlockDiagonalMask":
        self.causal = True
        return self


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, *, attn_bias: Any, scale: float) -> Tensor:
    """xformers/ops/fmha/__init__.py."""
    assert q.shape[:2] == (1, sum(attn_bias.lengths)) and min(attn_bias.lengths) > 0
    pieces = zip(*(x[0].split(attn_bias.lengths) for x in (q, k, v)), strict=True)
    return torch.cat([dense(*piece, scale, causal=attn_bias.causal) for piece in pieces])[None]


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashAttn:
    module = FlashAttn("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": BlockDiagonalMask},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


def check(attend: Any, layout: PackedLayout, mask: SpacetimeMask, kv_layout: PackedLayout | None = None) -> None:
    """Output and gradients are those of the torch backend, with NaN in the padding."""
    torch.manual_seed(0)
    sides = (layout, kv_layout or layout, kv_layout or layout, layout)
    *qkv, gradient = (
        torch.randn(side.capacity, 2, 8).masked_fill_((side.segment_ids < 0)[:, None, None], float("nan"))
        for side in sides
    )
    schedule = TileSchedule.build(layout, mask, kv_layout=kv_layout)
    results = []
    for theirs in (True, False):
        q, k, v = (x.clone().requires_grad_() for x in qkv)
        if theirs:
            out = attend(q, k, v, schedule, scale=0.3, deterministic=None)
        else:
            out = packed_attention(q, k, v, layout, schedule, kv_layout=kv_layout, scale=0.3, backend="torch")
        results.append((out, *torch.autograd.grad(out, (q, k, v), gradient)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", [LAYOUT, TILED])
@pytest.mark.parametrize("mask", MASKS)
def test_flash_attn_gives_the_same(mask: SpacetimeMask, layout: PackedLayout, flash: FlashAttn) -> None:
    check(peers.flash_attn, layout, mask)
    assert flash.sizes == (layout.cu_seqlens, layout.cu_seqlens, layout.capacity, layout.capacity)
    assert flash.options == {"softmax_scale": 0.3, "causal": mask.causal_tokens, "deterministic": False}


def test_flash_attn_crosses(flash: FlashAttn) -> None:
    check(peers.flash_attn, LAYOUT, SpacetimeMask.full(), TEXT)
    assert flash.sizes == (LAYOUT.cu_seqlens, TEXT.cu_seqlens, 61, 15)


@pytest.mark.parametrize("layout", [LAYOUT, TILED])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.usefixtures("xformers")
def test_xformers_gives_the_same(mask: SpacetimeMask, layout: PackedLayout) -> None:
    check(peers.xformers, layout, mask)


@pytest.mark.usefixtures("xformers")
def test_xformers_is_not_called_for_an_empty_pack() -> None:
    q, schedule = torch.full((5, 2, 8), float("nan")), TileSchedule.build(PackedLayout.from_grids([], capacity=5))
    assert not peers.xformers(q, q, q, schedule, scale=0.3, deterministic=None).any()


def test_offered_for_what_they_can_express() -> None:
    q, full = torch.zeros(61, 2, 8, dtype=torch.bfloat16), TileSchedule.build(LAYOUT)
    usual = {"cross": False, "lse": False, "deterministic": False}
    assert peers.offered(q, q, full, **usual) == ("flash_attn", "xformers")
    assert peers.offered(q, q, TileSchedule.build(LAYOUT, MASKS[1]), **usual) == ("flash_attn", "xformers")
    for change in ({"cross": True}, {"deterministic": True}):
        assert peers.offered(q, q, full, **{**usual, **change}) == ("flash_attn",)
    assert peers.offered(q, q[:, :1], full, **usual) == ("flash_attn",)
    assert peers.offered(q, q, full, **{**usual, "lse": True}) == ()
    assert peers.offered(q.float(), q.float(), full, **usual) == ()
    assert peers.offered(q, q, TileSchedule.build(LAYOUT, SpacetimeMask.frame_causal()), **usual) == ()
    assert peers.offered(q, q, TileSchedule.build(LAYOUT, MASKS[1]), **{**usual, "cross": True}) == ()
    joint = JointLayout.build(PackedLayout.from_grids([], max_segments=LAYOUT.max_segments), LAYOUT).layout
    assert peers.offered(q, q, TileSchedule.build(joint), **usual) == ("flash_attn", "xformers")
    assert peers.offered(q, q, TileSchedule.build(joint, MASKS[1]), **usual) == ()


@pytest.mark.parametrize("backend", ["flash_attn", "xformers"])
def test_absence_is_no_error_and_is_told(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(61, 2, 8).bfloat16()
    found = importlib.util.find_spec
    dispatch = importlib.import_module("sora_fast.ops._dispatch")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None if name == backend else found(name))
    with sora_fast.use_backend(backend):
        assert torch.equal(packed_attention(q, q, q, LAYOUT), packed_attention(q, q, q, LAYOUT, backend="torch"))
    assert f"the package {backend} is not installed" in sora_fast.explain()
    with pytest.raises(ValueError, match=f"'{backend}' cannot run packed_attention here: the package {backend} is not"):
        packed_attention(q, q, q, LAYOUT, backend=backend)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=f"the tensors are on cpu; {backend} needs cuda"):
        packed_attention(q, q, q, LAYOUT, backend=backend)


def test_the_dispatch_calls_what_was_chosen(monkeypatch: pytest.MonkeyPatch, flash: FlashAttn) -> None:
    module = importlib.import_module("sora_fast.ops.packed_attention")
    monkeypatch.setattr(
        module, "choose", lambda op, backend, device, offered, dtype, **_: backend if backend in offered else "torch"
    )
    q, k, v = torch.randn(3, 61, 2, 8).bfloat16()
    out = packed_attention(q, k, v, LAYOUT, scale=0.3, deterministic=True, backend="flash_attn")
    assert flash.options == {"softmax_scale": 0.3, "causal": False, "deterministic": True}
    torch.testing.assert_close(out, packed_attention(q, k, v, LAYOUT, scale=0.3, backend="torch"), rtol=2e-2, atol=2e-2)


def test_the_offer_is_made_in_a_compiled_graph() -> None:
    with no_recompilation():
        compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager")
        q = torch.randn(61, 2, 8).bfloat16()
        for mask in MASKS[1:] * 2:
            assert torch.equal(compiled(q, q, q, LAYOUT, mask), packed_attention(q, q, q, LAYOUT, mask))
