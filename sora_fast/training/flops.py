"""Floating-point operations of a training step, from what a batch holds: useful tokens and the pairs a mask allows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from sora_fast.masks import SpacetimeMask
from sora_fast.models import SoraDiTConfig
from sora_fast.packing import PackedLayout
from sora_fast.training.batches import Batch


@dataclass(frozen=True)
class Flops:
    """Of one forward pass: in products with weights, and in those of attention's scores and values."""

    linear: int
    attention: int

    @property
    def forward(self) -> int:
        return self.linear + self.attention

    @property
    def step(self) -> int:
        """Forward and backward: each product once forward and twice backward.

        What is computed twice to save memory (attention's scores, recomputed activations) counts once, as is the custom
        for MFU (PaLM, arXiv 2204.02311, appendix B).
        """
        return 3 * self.forward


def batch_flops(config: SoraDiTConfig, batch: Batch) -> Flops:
    """Of the model on a batch that is still on the host; padding counts nothing, nor does the text encoder.

    Where tokens were dropped, the pairs of a mask that is not full are those of the whole grid times the square of the
    share that stays: what a random choice leaves on average.
    """
    lengths, grids = _lengths(batch.layout), batch.layout.grids.tolist()
    texts = [0] * len(lengths) if batch.prompts is None else _lengths(batch.prompts.layout)
    return model_flops(config, lengths, grids, texts)


def model_flops(
    config: SoraDiTConfig, lengths: Sequence[int], grids: Sequence[Sequence[int]], texts: Sequence[int]
) -> Flops:
    """Of segments with so many tokens, of grids (T, H, W), and so many text tokens.

    Tables of shifts, scales and gates are made per noise level, not per token; two a segment are counted (given frames
    have a level of their own).
    """
    tokens, rows = sum(lengths), 2 * sum(length > 0 for length in lengths)
    reads_text = config.text_dim is not None
    hidden = int(config.mlp_ratio * config.dim)
    mlp = (3 if config.mlp == "swiglu" else 2) * config.dim * hidden
    per_token = config.depth * (4 * config.dim**2 + mlp + reads_text * 2 * config.dim**2)
    patch = config.in_channels * math.prod(config.patch_size)
    per_token += (3 if config.learned_sigma else 2) * patch * config.dim
    per_row = (config.depth * (9 if reads_text else 6) + 2) * config.dim**2 + (256 + config.dim) * config.dim
    per_text = config.depth * 2 * config.dim * config.text_dim if reads_text else 0
    pairs = sum(_pairs(config.mask, length, tuple(grid)) for length, grid in zip(lengths, grids, strict=True))
    if reads_text:
        pairs += sum(length * text for length, text in zip(lengths, texts, strict=True))
    linear = 2 * (tokens * per_token + rows * per_row + sum(texts) * per_text)
    return Flops(linear, 4 * config.depth * config.dim * pairs)


def _pairs(mask: SpacetimeMask, length: int, grid: tuple[int, int, int]) -> int:
    if mask.is_full:
        return length**2
    return round(_whole_pairs(mask, grid) * (length / math.prod(grid)) ** 2) if length else 0


@lru_cache(maxsize=1 << 12)
def _whole_pairs(mask: SpacetimeMask, grid: tuple[int, int, int]) -> int:
    return mask.pairs(grid)


def _lengths(layout: PackedLayout) -> list[int]:
    if layout.device != torch.device("cpu"):
        raise ValueError(f"batch: on {layout.device}; it must be counted before it leaves the host")
    return layout.cu_seqlens.diff().tolist()
