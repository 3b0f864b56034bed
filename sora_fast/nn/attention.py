"""Attention over packed tokens: to each other, and to the packed text of their own segment."""

import torch
from torch import Tensor, nn

from sora_fast.ops.packed_attention import packed_attention
from sora_fast.ops.qk_norm_rope import Rope3D, qk_norm_rope
from sora_fast.packing import PackedLayout
from sora_fast.schedule import TileSchedule


class PackedAttention(nn.Module):
    """Self-attention with optional QK-norm and 3D RoPE; state dict: qkv, proj (as in DiT), q_norm, k_norm."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool = True, rope: Rope3D | None = None) -> None:
        super().__init__()
        self.heads = _checked_heads(dim, heads)
        self.rope = rope
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.Parameter(torch.ones(dim // heads)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(dim // heads)) if qk_norm else None

    def forward(self, x: Tensor, layout: PackedLayout, schedule: TileSchedule) -> Tensor:
        """x: [N, C] → [N, C]. schedule: the mask over this layout, built once a batch."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        if self.q_norm is not None or self.rope is not None:
            q, k = qk_norm_rope(q, k, self.q_norm, self.k_norm, layout, self.rope)
        return self.proj(packed_attention(q, k, v, layout, schedule).flatten(1))


class PackedCrossAttention(nn.Module):
    """Tokens of segment s attend all text tokens of segment s; a segment without text gets the bias of `proj`."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = _checked_heads(dim, heads)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, context: Tensor, layout: PackedLayout, context_layout: PackedLayout, schedule: TileSchedule
    ) -> Tensor:
        """x: [N, C], context: [Nt, context_dim] → [N, C]. schedule: built with kv_layout=context_layout."""
        q = self.q(x).unflatten(1, (self.heads, -1))
        k, v = self.kv(context).unflatten(1, (2, self.heads, -1)).unbind(1)
        return self.proj(packed_attention(q, k, v, layout, schedule, kv_layout=context_layout).flatten(1))


def _checked_heads(dim: int, heads: int) -> int:
    if heads < 1 or dim % heads:
        raise ValueError(f"heads: {heads}; it must divide the width {dim}")
    return heads
