"""Backend cuda of packed attention: the op around the compiled kernels, which an emulator executes here."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.ops import _attention_cuda as compiled
from sora_fast.ops import packed_attention
from sora_fast.packing import JointLayout, PackedLayout
from sora_fast.schedule import TileSchedule
from tests.helpers import assert_within_rule
from tests.hopper.emulated import library

module = importlib.import_module("sora_fast.ops.packed_attention")
GRIDS = [(2, 6, 9), (1, 1, 1), (0, 2, 2), (3, 4, 5)]
FRAMES, TOKENS = SpacetimeMask.frame_causal(), SpacetimeMask.token_causal()
MASKS = [SpacetimeMask.full(), FRAMES, TOKENS, SpacetimeMask.window(1, 2, 2)]


@dataclass(frozen=True, eq=False)
class Batch:
    """q, k, v with gradients, and a schedule."""

    qkv: tuple[Tensor, Tensor, Tensor]
    schedule: TileSchedule

    @staticmethod
    def random(mask: SpacetimeMask, *, head_dim: int = 64, order: str = "raster") -> "Batch":
        torch.manual_seed(0)
        layout = PackedLayout.from_grids(GRIDS, order=order, for_mask=mask, capacity=180)
        x = torch.randn(layout.capacity, 4, head_dim).bfloat16()  # two heads of q, one of k and of v
        x[layout.segment_ids < 0] = 0
        qkv = (x[:, :2], x[:, 2:3], x[:, 3:])
        return Batch(tuple(part.detach().requires_grad_() for part in qkv), TileSchedule.build(layout, mask))

    def exact(self) -> "Batch":
        return Batch(tuple(x.detach().double().requires_grad_() for x in self.qkv), self.schedule)

    def on_cuda(self, scale: float) -> tuple[Tensor, Tensor]:
        """As `packed_attention` calls it on a GPU."""
        schedule = self.schedule
        sizes = [schedule.layout.tile_size, schedule.kv_layout.tile_size]
        options = module._tensors(schedule), sizes, module._kind(schedule), scale, True
        return module._cuda_attention(*self.qkv, *options)

    def in_pytorch(self, scale: float) -> tuple[Tensor, Tensor]:
        options = {"scale": scale, "return_lse": True, "backend": "torch"}
        out, lse = packed_attention(*self.qkv, self.schedule.layout, self.schedule, **options)
        return out, lse.transpose(0, 1)

    def gradients(self, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """Of a sum that holds the logsumexp too, where there is one."""
        finite = lse.masked_fill(torch.isinf(lse), 0.0)
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(out.shape, generator=generator).to(out.dtype)
        return torch.autograd.grad((out * upstream).sum() + finite.sum().to(out.dtype), self.qkv)


@pytest.mark.parametrize("scale", [0.125, -0.125])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("order", ["raster", "tiled"])
def test_op_and_gradients_match_fp64(mask: SpacetimeMask, order: str, scale: float) -> None:
    batch, exact = Batch.random(mask, order=order), Batch.random(mask, order=order).exact()
    with library().native():
        out, lse = batch.on_cuda(scale)
        grads = batch.gradients(out, lse)
    truth = exact.in_pytorch(scale)
    plain = dense(batch, scale)
    assert_within_rule(out, plain[0], truth[0], name="out")
    some = torch.isfinite(truth[1])
    assert torch.equal(torch.isfinite(lse), some) and torch.allclose(lse[some].double(), truth[1][some], atol=1e-5)
    names = ("grad_q", "grad_k", "grad_v")
    wanted = zip(names, grads, batch.gradients(*plain), exact.gradients(*truth), strict=True)
    for name, ours, theirs, right in wanted:
        assert_within_rule(ours, theirs, right, name=name)


def dense(batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
    """Attention as one writes it down, in the dtype of q, over a matrix of all pairs."""
    q, k, v = batch.qkv
    layout, mask = batch.schedule.layout, batch.schedule.mask
    allowed = mask.materialize(layout)
    some = allowed.any(dim=1)
    scores = torch.einsum("qhd,kgd->hqk", q, k) * scale
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(~some[:, None], 0)
    out = torch.einsum("hqk,kgd->qhd", scores.softmax(-1) * some[:, None], v)
    return out, scores.float().logsumexp(-1).masked_fill(~some, -torch.inf)


def test_gradient_of_the_queries_alone() -> None:
    batch = Batch.random(MASKS[0])
    q, k, v = batch.qkv
    alone = Batch((q, k.detach(), v.detach()), batch.schedule)
    with library().native():
        (grad,) = torch.autograd.grad(alone.on_cuda(0.125)[0].sum(), q)
        full = torch.autograd.grad(batch.on_cuda(0.125)[0].sum(), batch.qkv)
    assert torch.equal(grad, full[0])


def test_tensors_that_tma_cannot_read_are_copied() -> None:
    """Addresses at odd places, and expanded gradients."""
    batch = Batch.random(MASKS[0])
    with library().native():
        right = torch.autograd.grad(batch.on_cuda(0.125)[0].sum(), batch.qkv)
        shifted = [torch.cat([x.flatten()[:1], x.detach().flatten()])[1:].view(x.shape) for x in batch.qkv]
        moved = Batch(tuple(x.requires_grad_() for x in shifted), batch.schedule)
        assert all(x.data_ptr() % 16 for x in shifted)
        grads = torch.autograd.grad(moved.on_cuda(0.125)[0].sum(), moved.qkv)
    assert all(torch.equal(one, other) for one, other in zip(grads, right, strict=True))


def test_refusals_say_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_major", lambda device: 9)
    q = torch.zeros(8, 2, 64, dtype=torch.bfloat16)
    assert compiled.refusal(q, q, q) is None
    assert "not torch.float32" in compiled.refusal(q.float(), q.float(), q.float())
    assert "head dim 60" in compiled.refusal(*[q[..., :60]] * 3)
    assert "head dim 136" in compiled.refusal(*[q.new_zeros(8, 1, 136)] * 3)
    flipped = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert "k has strides (128, 1, 2)" in compiled.refusal(q, flipped, q)
    monkeypatch.setattr(compiled, "_major", lambda device: 10)
    assert "Hopper" in compiled.refusal(q, q, q)


def test_masks_that_need_two_raster_places_are_refused() -> None:
    layout = PackedLayout.from_grids([(2, 3, 3)])
    joint = JointLayout.build(PackedLayout.from_grids([(5, 1, 1)]), layout).layout
    schedules = [TileSchedule.build(joint, TOKENS), TileSchedule.build(layout, TOKENS, kv_layout=layout)]
    reasons = [compiled.refusal_of_mask(schedule) for schedule in schedules]
    assert "with a joint layout" in reasons[0] and "with kv_layout" in reasons[1]
    for mask in (FRAMES, MASKS[-1], MASKS[0]):
        assert compiled.refusal_of_mask(TileSchedule.build(joint, mask)) is None
        assert compiled.refusal_of_mask(TileSchedule.build(layout, mask, kv_layout=layout)) is None


def test_asked_for_where_it_cannot_run_says_why() -> None:
    batch = Batch.random(MASKS[0])
    with pytest.raises(ValueError, match="cuda needs cuda"):
        packed_attention(*batch.qkv, batch.schedule.layout, batch.schedule, backend="cuda")
