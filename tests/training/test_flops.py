"""FLOPs counted from a batch, held to what PyTorch counts in the model's own products."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sora_fast.masks import SpacetimeMask
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.models.text import PackedText
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.training.flops import FlopCount, Flops

PLAIN = SoraDiTConfig(dim=32, depth=2, heads=2, in_channels=3, patch_size=(1, 2, 2))
GRIDS, LENGTHS, WORDS = [(3, 2, 4), (1, 5, 3)], [24, 15], [7, 2]


def flops(lengths: list[int], grids: list[tuple[int, int, int]], words: list[int] | None = None, **change) -> Flops:
    return FlopCount(SoraDiT(replace(PLAIN, **change))).segments(lengths, grids, words)


def counted(config: SoraDiTConfig) -> int:
    """Products with weights in one forward pass without padding, two noise levels a segment.

    patch_embed's is inside an op, which the counter does not look into.
    """
    layout = PackedLayout.from_grids(GRIDS)
    latents = RaggedLatents.from_list([torch.randn(3, t, 2 * h, 2 * w) for t, h, w in GRIDS])
    words = PackedLayout.from_grids([(length, 1, 1) for length in WORDS])
    text = PackedText(torch.randn(sum(WORDS), 8), words, torch.randn(len(WORDS), 6))
    clean = layout.coords[:, 0] == 0
    conditioning = Conditioning.with_clean(torch.tensor([0.3, 0.6]), clean, layout)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        SoraDiT(config)(latents, layout, conditioning, text=text, labels=torch.tensor([1, 2]))
    seen = sum(counter.get_flop_counts()["Global"].get(op, 0) for op in (torch.ops.aten.addmm, torch.ops.aten.mm))
    return seen + 2 * layout.capacity * 12 * config.dim


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mlp": "swiglu", "mlp_ratio": 2.5},
        {"text_dim": 8, "pooled_dim": 6},
        {"learned_sigma": True, "discrete_time": True, "num_classes": 4},
        {"position": "factorised"},
    ],
    ids=lambda change: ", ".join(change) or "plain",
)
def test_products_with_weights_are_those_that_run(change: dict) -> None:
    assert flops(LENGTHS, GRIDS, WORDS, **change).linear == counted(replace(PLAIN, **change))


def test_attention_counts_the_pairs_that_the_mask_allows() -> None:
    grid = [(4, 3, 2)]
    full = flops([24], grid).attention
    assert full == PLAIN.depth * 4 * PLAIN.dim * 24**2
    assert flops([24], grid, mask=SpacetimeMask.spatial()).attention == full // 4
    assert flops([24], grid, [5], text_dim=8).attention == full + PLAIN.depth * 4 * PLAIN.dim * 24 * 5


def test_dropped_tokens_take_their_pairs_with_them() -> None:
    grid, whole = [(4, 3, 2)], flops([24], [(4, 3, 2)])
    assert flops([12], grid).attention == whole.attention // 4
    spatial = {"mask": SpacetimeMask.spatial()}
    assert flops([12], grid, **spatial).attention == flops([24], grid, **spatial).attention // 4


def test_unused_segments_count_nothing_and_a_step_three_forward_passes() -> None:
    whole = flops([24], [(4, 3, 2)])
    assert flops([24, 0], [(4, 3, 2), (0, 0, 0)]) == whole
    assert whole.step == 3 * (whole.linear + whole.attention)
