"""Packing: many videos and images of any shape in one sequence, without padding."""

from sora_fast.packing.conditioning import Conditioning, RowIndex
from sora_fast.packing.latents import RaggedLatents
from sora_fast.packing.layout import PackedLayout

__all__ = ["Conditioning", "PackedLayout", "RaggedLatents", "RowIndex"]
