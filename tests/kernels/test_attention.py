"""How the attention kernels divide their work, and what they read it by."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.tools.tensor_descriptor import TensorDescriptor

from sora_fast import use_backend
from sora_fast.kernels._attention_config import block_sizes
from sora_fast.kernels._attention_operands import Head, describable
from sora_fast.kernels._attention_walk import item_of, slot_and_head
from sora_fast.kernels._launch import recording
from sora_fast.masks import SpacetimeMask
from sora_fast.ops import packed_attention
from sora_fast.packing import PackedLayout
from tests.helpers import assert_within_rule

HOPPER, AMPERE = (9, 0), (8, 0)


@triton.jit
def _mark(visits, slots, heads, steps):
    for step in range(0, steps):
        item = item_of(step)
        if item < slots * heads:
            slot, head = slot_and_head(item, slots, heads)
            tl.atomic_add(visits + slot * heads + head, 1)


@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 9))
def test_programs_take_every_block_of_every_head_once(
    device: torch.device, slots: int, heads: int, programs: int
) -> None:
    visits = torch.zeros(slots, heads, dtype=torch.int32, device=device)
    _mark[(programs,)](visits, slots, heads, triton.cdiv(slots * heads, programs))
    assert (visits == 1).all()


def _launches(arch: tuple[int, int], x: torch.Tensor, mask: SpacetimeMask | None = None) -> list[dict[str, Any]]:
    """Constants of the kernels that attention of x to itself and its gradients launch."""
    q, k, v = (x.detach().requires_grad_() for _ in range(3))
    with recording(arch) as recorder, use_backend("triton"):
        out = packed_attention(q, k, v, PackedLayout.from_grids([(1, 1, len(x))]), mask)
        torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    return [meta for _, _, meta in recorder.launches if "BLOCKING" in meta]


_WIDE = torch.zeros(64, 2, 24, dtype=torch.float16)
CANNOT_BE_DESCRIBED = {
    "float32": torch.zeros(64, 2, 16),
    "dims apart": torch.zeros(64, 16, 2, dtype=torch.float16).mT,
    "tokens at odd strides": torch.zeros(64, 33, dtype=torch.float16)[:, :32].unflatten(1, (2, 16)),
    "an odd start": torch.zeros(64, 40, dtype=torch.float16)[:, 4:36].unflatten(1, (2, 16)),
    "one head for all": torch.zeros(64, 1, 16, dtype=torch.float16).expand(-1, 2, -1),
    "nothing": _WIDE[:0],
}


@pytest.mark.parametrize("name", CANNOT_BE_DESCRIBED)
def test_what_descriptors_cannot_read_is_read_by_pointers(name: str) -> None:
    assert not describable(HOPPER, _WIDE, CANNOT_BE_DESCRIBED[name])


def test_descriptors_are_hoppers_and_of_ranges() -> None:
    described = [meta["BLOCKING"].described for meta in _launches(HOPPER, _WIDE)]
    assert described == [True] * 3  # forward, dQ, dK and dV
    assert not any(meta["BLOCKING"].described for meta in _launches(AMPERE, _WIDE))
    # Tiles in a list are cut short here and there.
    assert not any(meta["BLOCKING"].described for meta in _launches(HOPPER, _WIDE, SpacetimeMask.window(0, 1, 1)))


def test_a_video_does_not_see_the_infinities_behind_it(device: torch.device) -> None:
    """Its last block is loaded whole, with the first rows of the next video."""
    lengths, head_dim = (150, 60), 16
    layout = PackedLayout.from_grids([(1, 1, n) for n in lengths], device=device)
    torch.manual_seed(0)
    q, k, v, slope = torch.randn(4, sum(lengths), 1, head_dim, device=device, dtype=torch.float16).unbind()
    for x in (q, k, v, slope):
        x[lengths[0] :] = float("inf")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = packed_attention(q, k, v, layout, backend="triton")
    results = [x[: lengths[0]].cpu() for x in (out, *torch.autograd.grad(out, (q, k, v), slope))]
    expected = {}
    for dtype in (torch.float16, torch.float64):
        a, b, c, d = (x[: lengths[0], 0].detach().cpu().to(dtype).requires_grad_() for x in (q, k, v, slope))
        dense = ((a @ b.T) * head_dim**-0.5).softmax(-1) @ c
        expected[dtype] = [x[:, None].detach() for x in (dense, *torch.autograd.grad(dense, (a, b, c), d))]
    for name, actual, plain, exact in zip(("out", "q", "k", "v"), results, *expected.values(), strict=True):
        assert_within_rule(actual.detach(), plain, exact, name=name, terms=4.0)


@pytest.mark.parametrize("kernel", ["forward", "grad_query", "grad_key_value", "one_pass"])
@pytest.mark.parametrize("arch", [AMPERE, HOPPER, (10, 0), (12, 0)])
def test_every_head_dim_has_blocks_for_every_mask(kernel: str, arch: tuple[int, int]) -> None:
    for head_dim in range(8, 257, 8):
        for mask in ("full", "past", "boxes"):
            blocks = block_sizes(kernel, torch.bfloat16, head_dim, arch, mask)
            assert 16 <= blocks.other <= 128, head_dim
            # Products of 64 rows a warpgroup of four warps, where they are Hopper's, and not of fewer than N = 32. (Of
            # one pass, which no GPU takes by default, not past head dim 128.)
            if arch == HOPPER and (kernel != "one_pass" or head_dim <= 128):
                warpgroups = blocks.num_warps // 4
                assert blocks.own >= 64, head_dim
                assert blocks.other // max(1, warpgroups * 64 // blocks.own) >= 32, head_dim


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor, lengths: list[int]) -> list[Any]:
    """Output and gradients, video by video. Heads of keys are repeated over their group."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    parts = []
    for a, b, c in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        b, c = (x.repeat_interleave(group, 1) for x in (b, c))
        scores = torch.einsum("qhd,khd->hqk", a, b) * q.shape[2] ** -0.5
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), c))
    out = torch.cat(parts)
    return [x.detach() for x in (out, *torch.autograd.grad(out, (q, k, v), slope))]


@pytest.mark.parametrize(
    ("lengths", "tile_size", "group", "dtype"),
    [
        ([47, 20], 16, 3, torch.float16),  # what is left of whole blocks, for every head of a group
        ([32], 32, 1, torch.float32),  # the last tile is full, and of several blocks
        ([127, 40], 128, 1, torch.float16),  # one key less than a block, and a neighbour behind it
    ],
)
def test_ends_of_videos(
    device: torch.device, lengths: list[int], tile_size: int, group: int, dtype: torch.dtype
) -> None:
    layout = PackedLayout.from_grids([(1, 1, n) for n in lengths], tile_size=tile_size, device=device)
    torch.manual_seed(0)
    q, slope = torch.randn(2, sum(lengths), 2 * group, 16, dtype=dtype)
    k, v = torch.randn(2, sum(lengths), 2, 16, dtype=dtype)
    given = [x.to(device).requires_grad_() for x in (q, k, v)]
    out = packed_attention(*given, layout, backend="triton")
    results = [x.detach().cpu() for x in (out, *torch.autograd.grad(out, given, slope.to(device)))]
    plain, exact = (_dense(*(x.to(kind) for x in (q, k, v, slope)), lengths) for kind in (dtype, torch.float64))
    for name, *values in zip(("out", "q", "k", "v"), results, plain, exact, strict=True):
        assert_within_rule(*values, name=name, terms=4.0)


def test_a_gradient_that_descriptors_cannot_read_is_read_by_pointers() -> None:
    q, k, v = (_WIDE.detach().requires_grad_() for _ in range(3))
    with recording(HOPPER) as recorder, use_backend("triton"):
        out = packed_attention(q, k, v, PackedLayout.from_grids([(1, 1, len(q))]))
        torch.autograd.grad(out.sum(), (q, k, v))  # ones, expanded
    described = [meta["BLOCKING"].described for _, _, meta in recorder.launches if "BLOCKING" in meta]
    assert described == [True, True, False]  # forward, dQ (of k and v), dK and dV


@pytest.mark.parametrize("dim", [64, 72])
def test_descriptors_are_those_that_triton_makes(dim: int) -> None:
    """Ours are not checked by it one by one."""
    x, y = torch.zeros(2, 40, 3, 2, 80, dtype=torch.bfloat16)[..., 1, :dim]
    head = Head.of(x, y)
    made = head.descriptors((x, y), 32, wanted=True)
    columns = (64, head.rest)
    wanted = [
        TensorDescriptor(z, [3, 40, dim], [160, 480, 1], [1, 32, width]) if width else None
        for z in (x, y)
        for width in columns
    ]
    assert len(made) == len(wanted) == 4
    for own, triton_s in zip(made, wanted, strict=True):
        assert type(own) is type(triton_s)
        if own is not None:
            assert own.base is triton_s.base
            assert {**vars(own), "base": 0} == {**vars(triton_s), "base": 0}
    assert head.descriptors((x, y), 32, wanted=False) == [None] * 4
