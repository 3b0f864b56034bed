"""The kernels on a GPU beside the same kernels in the emulator: what validates the emulator itself."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.ops import _attention_cuda as compiled
from sora_fast.ops import _library, packed_attention
from tests.hopper.cases import Case
from tests.hopper.emulated import library
from tests.hopper.test_attention_backward import gradients, upstream
from tests.hopper.test_attention_forward import FRAMES, TOKENS, WINDOW, several_tiles

pytestmark = pytest.mark.gpu

FULL = SpacetimeMask.full()
FORMS = [(mask, head_dim) for mask in (FULL, FRAMES, TOKENS, WINDOW) for head_dim in (64, 72, 96, 128)]


@pytest.fixture(autouse=True)
def compiled_kernels() -> None:
    reason = compiled.refusal_here(torch.device("cuda", 0), torch.bfloat16) or _library.missing("cuda")
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize(("mask", "head_dim"), FORMS, ids=str)
def test_kernel_and_emulator_agree(mask: SpacetimeMask, head_dim: int) -> None:
    order = "tiled" if mask is WINDOW else "raster"
    case = Case(several_tiles(order=order), mask, heads=2, group=2, head_dim=head_dim)
    qkv, given = case.inputs(), upstream(case)
    wanted, grads = library().attention(*qkv, case.schedule()), gradients(case, qkv, given)

    on_gpu = replace(case, layout=case.layout.to("cuda"))
    ours = [x.cuda().requires_grad_() for x in qkv]
    out, lse = packed_attention(*ours, on_gpu.layout, on_gpu.schedule(), return_lse=True, backend="cuda")
    some = torch.isfinite(wanted.lse)
    total = (out * given[0].nan_to_num(0).cuda()).sum() + (lse.T.cpu()[some] * given[1][some]).sum().cuda()
    found = torch.autograd.grad(total, ours)

    assert torch.equal(torch.isfinite(lse.T.cpu()), some)
    assert (lse.T.cpu()[some] - wanted.lse[some]).abs().max() < 1e-4  # exp2 and log2 are approximations there
    for name, mine, theirs in zip(
        ("out", "grad_q", "grad_k", "grad_v"), (out, *found), (wanted.out, grads.q, grads.k, grads.v), strict=True
    ):
        assert_same_but_for_roundings(mine.detach().cpu(), theirs, name)


def assert_same_but_for_roundings(ours: Tensor, theirs: Tensor, name: str) -> None:
    """A weight that falls to the other side of a rounding moves a sum by a part of its last digit."""
    unit = torch.finfo(theirs.dtype).eps * theirs.float().abs().clamp(min=0.05)
    steps = (ours.float() - theirs.float()).abs() / unit
    assert steps.max() <= 4, f"{name}: {steps.max():.1f} units in the last place apart"
    assert (steps > 1).float().mean() < 0.01, f"{name}: more than one unit apart in {(steps > 1).float().mean():.1%}"
