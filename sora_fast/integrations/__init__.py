"""Other people's data structures, calls and checkpoints, taken as they are: one file for each project or format."""

from sora_fast.integrations.lines import layout_from_cu_seqlens
from sora_fast.integrations.padded import PaddedBatch, padded_attention

__all__ = ["PaddedBatch", "layout_from_cu_seqlens", "padded_attention"]
