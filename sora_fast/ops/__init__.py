"""The ops: contracts, PyTorch and Triton backends, autograd, dispatch; one file each."""

from sora_fast.ops._schedule import filler
from sora_fast.ops.adaln import adaln
from sora_fast.ops.adaln_pair import adaln_pair
from sora_fast.ops.gated_residual import gated_residual
from sora_fast.ops.gated_residual_adaln import gated_residual_adaln
from sora_fast.ops.linear_unpatchify import linear_unpatchify
from sora_fast.ops.mlp_activation import mlp_activation
from sora_fast.ops.packed_attention import packed_attention
from sora_fast.ops.patch_embed import FactorisedPosition, patch_embed
from sora_fast.ops.qk_norm_rope import Rope3D, RopeTable, qk_norm_rope
from sora_fast.ops.segment_mean import segment_mean
from sora_fast.ops.unpatchify import unpatchify
from sora_fast.schedule import offer_filler

__all__ = [
    "FactorisedPosition",
    "Rope3D",
    "RopeTable",
    "adaln",
    "adaln_pair",
    "gated_residual",
    "gated_residual_adaln",
    "linear_unpatchify",
    "mlp_activation",
    "packed_attention",
    "patch_embed",
    "qk_norm_rope",
    "segment_mean",
    "unpatchify",
]

offer_filler(filler)
