"""Drop-in modules over the ops."""

from sora_fast.nn.adaln import AdaLNSingle, AdaLNZero
from sora_fast.nn.attention import PackedAttention, PackedCrossAttention
from sora_fast.nn.block import BlockContext, DiTBlock
from sora_fast.nn.embed import LabelEmbedder, TimestepEmbedder
from sora_fast.nn.final import FinalLayer
from sora_fast.nn.patch import PatchEmbed3D

__all__ = [
    "AdaLNSingle",
    "AdaLNZero",
    "BlockContext",
    "DiTBlock",
    "FinalLayer",
    "LabelEmbedder",
    "PackedAttention",
    "PackedCrossAttention",
    "PatchEmbed3D",
    "TimestepEmbedder",
]
