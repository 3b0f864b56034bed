"""Floating-point operations of a training step, from what a batch holds: useful tokens and the pairs a mask allows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from sora_fast.masks import SpacetimeMask
from sora_fast.models import SoraDiT
from sora_fast.packing import PackedLayout
from sora_fast.training.data.batches import Batch

# What of a SoraDiT runs on the rows of the modulation tables, on segments, on text tokens, on nothing; all else runs on
# tokens. The first that fits.
_PLACES = {
    "segments": ("text_embedder",),
    "rows": ("adaLN_modulation", "t_embedder.mlp"),
    "texts": ("cross.kv",),
    "nothing": ("embedding_table", "pos_embed"),
}


@dataclass(frozen=True)
class Flops:
    """Of one forward pass: in products with weights, and in those of attention's scores and values."""

    linear: int
    attention: int

    @property
    def forward(self) -> int:
        """All of it."""
        return self.linear + self.attention

    @property
    def step(self) -> int:
        """Forward and backward: each product once forward and twice backward.

        What is computed twice to save memory (attention's scores, recomputed activations) counts once, as is the custom
        for MFU (PaLM, arXiv 2204.02311, appendix B).
        """
        return 3 * self.forward


class FlopCount:
    """Counts the products of a SoraDiT: of the tokens that are there, and not of padding; the text encoder's are none.

    Tables of shifts, scales and gates are made per noise level, of which two a segment are counted (given frames have
    one of their own). Where tokens were dropped, the pairs of a mask that is not full are those of the whole grid times
    the square of the share that stays: what a random choice leaves on average.
    """

    def __init__(self, model: SoraDiT) -> None:
        self.mask = model.config.mask
        self.reads_text = model.config.text_dim is not None
        self.width = model.config.depth * model.config.dim
        self.weights = dict.fromkeys(("tokens", *_PLACES), 0)
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                place = (place for place, parts in _PLACES.items() if any(part in name for part in parts))
                self.weights[next(place, "tokens")] += weight.numel()

    def batch(self, batch: Batch) -> Flops:
        """Of a batch that has not left the host: ValueError if it has."""
        texts = None if batch.prompts is None else _lengths(batch.prompts.layout)
        return self.segments(_lengths(batch.layout), batch.layout.grids.tolist(), texts)

    def segments(
        self, lengths: Sequence[int], grids: Sequence[Sequence[int]], texts: Sequence[int] | None = None
    ) -> Flops:
        """Of segments of so many tokens, of grids (T, H, W), with so many text tokens."""
        texts = texts if self.reads_text and texts is not None else [0] * len(lengths)
        segments = sum(length > 0 for length in lengths)
        calls = {"tokens": sum(lengths), "rows": 2 * segments, "segments": segments, "texts": sum(texts), "nothing": 0}
        linear = sum(2 * calls[place] * count for place, count in self.weights.items())
        own = sum(_pairs(self.mask, length, tuple(grid)) for length, grid in zip(lengths, grids, strict=True))
        across = sum(length * text for length, text in zip(lengths, texts, strict=True))
        return Flops(linear, 4 * self.width * (own + across))


def _pairs(mask: SpacetimeMask, length: int, grid: tuple[int, int, int]) -> int:
    if mask.is_full or not length:
        return length**2
    return round(_whole_pairs(mask, grid) * (length / math.prod(grid)) ** 2)


@lru_cache(maxsize=1 << 12)
def _whole_pairs(mask: SpacetimeMask, grid: tuple[int, int, int]) -> int:
    return mask.pairs(grid)


def _lengths(layout: PackedLayout) -> list[int]:
    if layout.device != torch.device("cpu"):
        raise ValueError(f"batch: on {layout.device}; it must be counted before it leaves the host")
    return layout.cu_seqlens.diff().tolist()
