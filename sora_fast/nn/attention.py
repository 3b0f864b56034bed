"""Attention over packed tokens: to each other, and to the packed text of their own segment."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sora_fast.masks import SpacetimeMask
from sora_fast.nn.normed import Normed, linear
from sora_fast.ops.packed_attention import packed_attention
from sora_fast.ops.qk_norm_rope import Rope3D, qk_norm_rope
from sora_fast.packing import PackedLayout
from sora_fast.schedule import TileSchedule


class PackedAttention(nn.Module):
    """Self-attention with optional grouped queries, QK-norm and 3D RoPE.

    num_kv_heads: heads of the keys and values, each shared by heads / num_kv_heads of the queries; None: as many.
    State dict: qkv, whose rows are the queries' heads, the keys', the values' (without grouping as in DiT), proj and,
    with qk_norm, q_norm and k_norm [C / heads].
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        num_kv_heads: int | None = None,
        qk_norm: bool = True,
        rope: Rope3D | None = None,
        eps: float = 1e-6,
    ) -> None:
        """eps: of the QK-norm."""
        super().__init__()
        self.heads, self.num_kv_heads = _checked_heads(dim, heads, num_kv_heads)
        head_dim = dim // heads
        self.rope, self.eps = rope, eps
        self.qkv = nn.Linear(dim, dim + 2 * self.num_kv_heads * head_dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.Parameter(torch.ones(head_dim)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(head_dim)) if qk_norm else None

    def forward(
        self,
        x: Tensor | Normed,
        layout: PackedLayout,
        mask: SpacetimeMask | TileSchedule | None = None,
        *,
        segment_scale: Tensor | None = None,
    ) -> Tensor:
        """x: [N, C] → [N, C]. mask: None is the full one; a schedule, built once a batch, where layers share it.

        segment_scale: [S, 3] fp32, by which the positions (t, h, w) of each segment are scaled; see `qk_norm_rope`.
        """
        heads = linear(self.qkv, x).unflatten(1, (self.heads + 2 * self.num_kv_heads, -1))
        # `split` is written in Python, and takes three times as long.
        q, k, v = heads.split_with_sizes([self.heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if not (self.q_norm is None and self.rope is None and segment_scale is None):
            options = {"segment_scale": segment_scale, "eps": self.eps}
            q, k = qk_norm_rope(q, k, self.q_norm, self.k_norm, layout, self.rope, **options)
        return self.proj(packed_attention(q, k, v, layout, mask).flatten(1))


class KeysValues(NamedTuple):
    """What cross-attention reads of a text, [Nt, Hk, D] each: the same at every step of a sampler."""

    k: Tensor
    v: Tensor


class PackedCrossAttention(nn.Module):
    """Tokens of segment s attend all text tokens of segment s; a segment without text gets the bias of `proj`.

    num_kv_heads: as in `PackedAttention`. State dict: q, kv (the keys' heads, then the values'), proj.
    """

    def __init__(self, dim: int, heads: int, context_dim: int, *, num_kv_heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.num_kv_heads = _checked_heads(dim, heads, num_kv_heads)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * self.num_kv_heads * (dim // heads))
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor | Normed,
        context: Tensor | KeysValues,
        layout: PackedLayout,
        context_layout: PackedLayout,
        schedule: TileSchedule | None = None,
    ) -> Tensor:
        """x: [N, C], context: [Nt, context_dim], or what `keys_values` made of it → [N, C]. schedule: built with
        kv_layout=context_layout."""
        q = linear(self.q, x).unflatten(1, (self.heads, -1))
        k, v = context if isinstance(context, KeysValues) else self.keys_values(context)
        return self.proj(packed_attention(q, k, v, layout, schedule, kv_layout=context_layout).flatten(1))

    def keys_values(self, context: Tensor) -> KeysValues:
        """context: [Nt, context_dim]."""
        return KeysValues(*self.kv(context).unflatten(1, (2, self.num_kv_heads, -1)).unbind(1))


def _checked_heads(dim: int, heads: int, num_kv_heads: int | None) -> tuple[int, int]:
    if heads < 1 or dim % heads:
        raise ValueError(f"heads: {heads}; it must divide the width {dim}")
    num_kv_heads = heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads < 1 or heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: {num_kv_heads}; it must divide the {heads} heads")
    return heads, num_kv_heads
