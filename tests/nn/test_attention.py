from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.nn import PackedAttention, PackedCrossAttention
from sora_fast.ops import Rope3D
from sora_fast.packing import PackedLayout
from sora_fast.schedule import TileSchedule

GRIDS = [(2, 3, 4), (1, 1, 1), (3, 2, 2)]


def pieces(x: Tensor, layout: PackedLayout) -> list[Tensor]:
    offsets = layout.cu_seqlens.tolist()
    return [x[start:end] for start, end in pairwise(offsets)]


def heads(x: Tensor, count: int) -> Tensor:
    """[L, C] → [1, heads, L, C / heads]"""
    return x.unflatten(1, (count, -1)).transpose(0, 1)[None]


def expected_of(module: PackedAttention, x: Tensor, allowed: Tensor | None) -> Tensor:
    """What the module gives for one segment [L, C], by SDPA over repeated keys and values."""
    size = x.shape[1] // module.heads
    q, k, v = module.qkv(x).split([x.shape[1], *[module.num_kv_heads * size] * 2], dim=1)
    group = module.heads // module.num_kv_heads
    k, v = (heads(part, module.num_kv_heads).repeat_interleave(group, dim=1) for part in (k, v))
    q, k = (
        F.rms_norm(part, (size,), weight, module.eps)
        for part, weight in ((heads(q, module.heads), module.q_norm), (k, module.k_norm))
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return module.proj(out[0].transpose(0, 1).flatten(1))


@pytest.mark.parametrize("num_kv_heads", [None, 4, 2, 1])
@pytest.mark.parametrize("mask", [None, SpacetimeMask.frame_causal()])
def test_self_attention_is_sdpa_of_each_segment(num_kv_heads: int | None, mask: SpacetimeMask | None) -> None:
    torch.manual_seed(0)
    layout = PackedLayout.from_grids(GRIDS, capacity=48, max_segments=4, tile_size=16)
    module = PackedAttention(64, 4, num_kv_heads=num_kv_heads)
    for weight in (module.q_norm, module.k_norm):
        torch.nn.init.normal_(weight)
    x = torch.randn(48, 64)
    out = module(x, layout, mask)
    assert torch.equal(out, module(x, layout, TileSchedule.build(layout, mask)))
    for grid, given, made in zip([*GRIDS, (0, 0, 0)], pieces(x, layout), pieces(out, layout), strict=True):
        allowed = None if mask is None else mask.materialize(PackedLayout.from_grids([grid]))
        torch.testing.assert_close(made, expected_of(module, given, allowed), rtol=1e-4, atol=1e-5)


def test_the_qk_norm_has_an_eps_of_choice() -> None:
    layout = PackedLayout.from_grids([(2, 3, 4)])
    module, x = PackedAttention(32, 2, eps=0.5), torch.randn(24, 32)
    torch.testing.assert_close(module(x, layout), expected_of(module, x, None), rtol=1e-4, atol=1e-5)
    # Which the weights alone do not decide.
    usual = PackedAttention(32, 2)
    usual.load_state_dict(module.state_dict())
    assert not torch.allclose(usual(x, layout), module(x, layout), atol=1e-3)


def test_the_state_dict_is_plain_and_without_grouping_that_of_dit() -> None:
    shapes = {name: tuple(value.shape) for name, value in PackedAttention(32, 2).state_dict().items()}
    linear = {"qkv.weight": (96, 32), "qkv.bias": (96,), "proj.weight": (32, 32), "proj.bias": (32,)}
    assert shapes == {**linear, "q_norm": (16,), "k_norm": (16,)}
    grouped = PackedAttention(32, 4, num_kv_heads=1, qk_norm=False).state_dict()
    assert grouped.keys() == linear.keys() and grouped["qkv.weight"].shape == (48, 32)


def test_rotation_turns_grouped_keys_as_their_queries() -> None:
    torch.manual_seed(0)
    layout = PackedLayout.from_grids([(2, 3, 4)], tile_size=16)
    grouped = PackedAttention(64, 4, num_kv_heads=2, rope=Rope3D())
    full = PackedAttention(64, 4, rope=Rope3D())
    q, k, v = grouped.qkv.weight.split([64, 32, 32])
    k, v = (part.unflatten(0, (2, 16)).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v))
    full.load_state_dict({**grouped.state_dict(), "qkv.weight": torch.cat([q, k, v]), "qkv.bias": torch.zeros(192)})
    torch.nn.init.zeros_(grouped.qkv.bias)
    x = torch.randn(24, 64)
    torch.testing.assert_close(grouped(x, layout), full(x, layout))


def test_each_segment_has_positions_of_its_own_scale() -> None:
    torch.manual_seed(0)
    grids, scales = [(2, 3, 4), (3, 2, 2)], [(1.0, 0.5, 0.25), (2.0, 3.0, 1.0)]
    layout = PackedLayout.from_grids(grids, tile_size=16)
    module = PackedAttention(32, 2, rope=Rope3D())
    x = torch.randn(layout.capacity, 32)
    made = module(x, layout, segment_scale=torch.tensor(scales))
    for part, result, grid, scale in zip(pieces(x, layout), pieces(made, layout), grids, scales, strict=True):
        module.rope = Rope3D(scale=scale)
        torch.testing.assert_close(result, module(part, PackedLayout.from_grids([grid], tile_size=16)))


def test_a_scale_without_positions_is_named() -> None:
    layout = PackedLayout.from_grids(GRIDS)
    for qk_norm in (True, False):
        with pytest.raises(ValueError, match="segment_scale: given without a rope"):
            PackedAttention(32, 2, qk_norm=qk_norm)(torch.randn(37, 32), layout, segment_scale=torch.ones(3, 3))


@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_cross_attention_reads_the_text_of_its_segment(num_kv_heads: int) -> None:
    torch.manual_seed(0)
    layout = PackedLayout.from_grids(GRIDS, tile_size=16)
    text = PackedLayout.from_grids([(5, 1, 1), (0, 1, 1), (3, 1, 1)], capacity=10, tile_size=16)
    module = PackedCrossAttention(32, 2, 24, num_kv_heads=num_kv_heads)
    x, context = torch.randn(layout.capacity, 32), torch.randn(10, 24)
    out = module(x, context, layout, text, TileSchedule.build(layout, kv_layout=text))
    for index, (given, words, made) in enumerate(
        zip(pieces(x, layout), pieces(context, text), pieces(out, layout), strict=True)
    ):
        k, v = (heads(part, num_kv_heads).expand(1, 2, -1, -1) for part in module.kv(words).chunk(2, dim=1))
        expected = F.scaled_dot_product_attention(heads(module.q(given), 2), k, v)[0].transpose(0, 1).flatten(1)
        if index == 1:  # no text: nothing is attended
            expected = torch.zeros_like(expected)
        torch.testing.assert_close(made, module.proj(expected), rtol=1e-4, atol=1e-5)


def test_bad_heads_are_named() -> None:
    with pytest.raises(ValueError, match="heads: 5; it must divide the width 32"):
        PackedAttention(32, 5)
    with pytest.raises(ValueError, match="num_kv_heads: 3; it must divide the 4 heads"):
        PackedAttention(32, 4, num_kv_heads=3)
