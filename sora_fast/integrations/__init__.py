"""Adapters from what other people's trainers hold to packed attention."""

from sora_fast.integrations.lines import layout_from_cu_seqlens
from sora_fast.integrations.padded import PaddedBatch, padded_attention

__all__ = ["PaddedBatch", "layout_from_cu_seqlens", "padded_attention"]
