"""FLOPs counted from a batch, held to what PyTorch counts in the model's own products."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sora_fast.masks import SpacetimeMask
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.models.text import PackedText
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.training.flops import model_flops

PLAIN = SoraDiTConfig(dim=32, depth=2, heads=2, in_channels=3, patch_size=(1, 2, 2))
GRIDS, WORDS = [(3, 2, 4), (1, 5, 3)], [7, 2]


def counted(config: SoraDiTConfig) -> int:
    """Products with weights in one forward pass without padding, two noise levels a segment.

    patch_embed's is inside an op, which the counter does not look into.
    """
    layout = PackedLayout.from_grids(GRIDS)
    latents = RaggedLatents.from_list([torch.randn(3, t, 2 * h, 2 * w) for t, h, w in GRIDS])
    words = PackedLayout.from_grids([(length, 1, 1) for length in WORDS])
    text = PackedText(torch.randn(sum(WORDS), 8), words) if config.text_dim else None
    clean = layout.coords[:, 0] == 0
    conditioning = Conditioning.with_clean(torch.tensor([0.3, 0.6]), clean, layout)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        SoraDiT(config)(latents, layout, conditioning, text=text)
    seen = sum(counter.get_flop_counts()["Global"].get(op, 0) for op in (torch.ops.aten.addmm, torch.ops.aten.mm))
    return seen + 2 * layout.capacity * 12 * config.dim


@pytest.mark.parametrize(
    "change",
    [{}, {"mlp": "swiglu", "mlp_ratio": 2.5}, {"text_dim": 8}, {"learned_sigma": True, "discrete_time": True}],
    ids=["plain", "swiglu", "text", "learned sigma"],
)
def test_products_with_weights_are_those_that_run(change: dict) -> None:
    config = replace(PLAIN, **change)
    lengths = [t * h * w for t, h, w in GRIDS]
    assert model_flops(config, lengths, GRIDS, WORDS).linear == counted(config)


def test_attention_counts_the_pairs_that_the_mask_allows() -> None:
    grid = (4, 3, 2)
    full = model_flops(PLAIN, [24], [grid], [0]).attention
    assert full == PLAIN.depth * 4 * PLAIN.dim * 24**2
    spatial = replace(PLAIN, mask=SpacetimeMask.spatial())
    assert model_flops(spatial, [24], [grid], [0]).attention == full // 4
    reads = replace(PLAIN, text_dim=8)
    assert model_flops(reads, [24], [grid], [5]).attention == full + PLAIN.depth * 4 * PLAIN.dim * 24 * 5


def test_dropped_tokens_take_their_pairs_with_them() -> None:
    whole = model_flops(PLAIN, [24], [(4, 3, 2)], [0])
    half = model_flops(PLAIN, [12], [(4, 3, 2)], [0])
    assert half.attention == whole.attention // 4
    spatial = replace(PLAIN, mask=SpacetimeMask.spatial())
    assert (
        model_flops(spatial, [12], [(4, 3, 2)], [0]).attention
        == model_flops(spatial, [24], [(4, 3, 2)], [0]).attention // 4
    )
    assert model_flops(PLAIN, [24, 0], [(4, 3, 2), (0, 0, 0)], [0, 0]) == whole
    assert whole.step == 3 * (whole.linear + whole.attention)
