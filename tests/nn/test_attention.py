from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.nn import PackedAttention, PackedCrossAttention
from sora_fast.packing import PackedLayout
from sora_fast.schedule import TileSchedule

GRIDS = [(2, 3, 4), (1, 1, 1), (3, 2, 2)]


def pieces(x: Tensor, layout: PackedLayout) -> list[Tensor]:
    offsets = layout.cu_seqlens.tolist()
    return [x[start:end] for start, end in pairwise(offsets)]


def heads(x: Tensor, count: int) -> Tensor:
    """[L, C] → [1, heads, L, C / heads]"""
    return x.unflatten(1, (count, -1)).transpose(0, 1)[None]


def test_self_attention_is_sdpa_of_each_segment() -> None:
    torch.manual_seed(0)
    layout = PackedLayout.from_grids(GRIDS, capacity=48, max_segments=4, tile_size=16)
    module = PackedAttention(32, 2, qk_norm=True)
    torch.nn.init.normal_(module.q_norm)
    x = torch.randn(48, 32)
    out = module(x, layout, TileSchedule.build(layout))
    for given, made in zip(pieces(x, layout), pieces(out, layout), strict=True):
        q, k, v = (heads(part, 2) for part in module.qkv(given).chunk(3, dim=1))
        q, k = F.rms_norm(q, (16,), module.q_norm, 1e-6), F.rms_norm(k, (16,), module.k_norm, 1e-6)
        expected = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
        torch.testing.assert_close(made, module.proj(expected), rtol=1e-4, atol=1e-5)


def test_cross_attention_reads_the_text_of_its_segment() -> None:
    torch.manual_seed(0)
    layout = PackedLayout.from_grids(GRIDS, tile_size=16)
    text = PackedLayout.from_grids([(5, 1, 1), (0, 1, 1), (3, 1, 1)], capacity=10, tile_size=16)
    module = PackedCrossAttention(32, 2, 24)
    x, context = torch.randn(layout.capacity, 32), torch.randn(10, 24)
    out = module(x, context, layout, text, TileSchedule.build(layout, kv_layout=text))
    for index, (given, words, made) in enumerate(
        zip(pieces(x, layout), pieces(context, text), pieces(out, layout), strict=True)
    ):
        k, v = (heads(part, 2) for part in module.kv(words).chunk(2, dim=1))
        expected = F.scaled_dot_product_attention(heads(module.q(given), 2), k, v)[0].transpose(0, 1).flatten(1)
        if index == 1:  # no text: nothing is attended
            expected = torch.zeros_like(expected)
        torch.testing.assert_close(made, module.proj(expected), rtol=1e-4, atol=1e-5)


def test_bad_heads_are_named() -> None:
    with pytest.raises(ValueError, match="heads: 5; it must divide the width 32"):
        PackedAttention(32, 5)
