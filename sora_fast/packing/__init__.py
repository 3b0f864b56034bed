"""Packing: many videos and images of any shape in one sequence, without padding."""

from sora_fast.packing.cache import PackedKVCache
from sora_fast.packing.conditioning import Conditioning, RowIndex
from sora_fast.packing.dropping import BetaDrop, ConstantDrop, ResolutionDrop, SigmoidDrop, kept_tokens, sample_keep
from sora_fast.packing.joint import JointLayout
from sora_fast.packing.latents import RaggedLatents
from sora_fast.packing.layout import PackedLayout, frame_tokens, token_grid
from sora_fast.packing.packer import PackRules, StreamingPacker, balance, pack_offline

__all__ = [
    "BetaDrop",
    "Conditioning",
    "ConstantDrop",
    "JointLayout",
    "PackRules",
    "PackedKVCache",
    "PackedLayout",
    "RaggedLatents",
    "ResolutionDrop",
    "RowIndex",
    "SigmoidDrop",
    "StreamingPacker",
    "balance",
    "frame_tokens",
    "kept_tokens",
    "pack_offline",
    "sample_keep",
    "token_grid",
]
