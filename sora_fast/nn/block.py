"""DiTBlock: adaLN-Zero self-attention, optional cross-attention to text, and MLP, joined by fused ops."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sora_fast.nn.adaln import AdaLNSingle, AdaLNZero
from sora_fast.nn.attention import KeysValues, PackedAttention, PackedCrossAttention
from sora_fast.nn.mlp import Mlp, SwiGLU
from sora_fast.nn.normed import Normed
from sora_fast.ops.gated_residual_adaln import gated_residual_adaln
from sora_fast.ops.qk_norm_rope import Rope3D
from sora_fast.packing import PackedLayout, RowIndex
from sora_fast.packing._bundle import TensorBundle
from sora_fast.schedule import TileSchedule


@dataclass(frozen=True, eq=False)
class BlockContext(TensorBundle):
    """What all blocks share in one forward pass; built once a batch.

    rows: row of the modulation table of every token.
    text, text_layout, text_schedule: the packed text, if the model reads any.
    segment_scale: of the rotary positions, as `PackedAttention` takes it.
    """

    layout: PackedLayout
    schedule: TileSchedule
    rows: RowIndex
    text: Tensor | None = None
    text_layout: PackedLayout | None = None
    text_schedule: TileSchedule | None = None
    segment_scale: Tensor | None = None


class DiTBlock(nn.Module):
    """One transformer block.

    The stream travels as a pair (x, h): the residual x and its normalised, modulated form h. Each branch ends in one
    pass over memory that gates it, adds it to x, and makes the h of whatever comes next, which for the last branch is
    the next block: its shift and scale are handed in.

    A forward pass on Triton's kernels is 9 launches, 4 matrix products and 5 passes over memory: qkv, qk_norm_rope,
    packed_attention, proj, gated_residual_adaln, fc1 (which leaves its bias to the next), mlp_activation, fc2,
    gated_residual_adaln. Without qk_norm and rope it is 8; cross-attention adds q, kv, packed_attention, proj and
    gated_residual_adaln. (The tables of `adaLN_modulation` are made on M rows, outside.)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp: str = "gelu",
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
        rope: Rope3D | None = None,
        context_dim: int | None = None,
        adaln: str = "zero",
        mlp_recompute: bool = False,
        norm_recompute: bool = False,
        eps: float = 1e-6,
        mlp_eps: float | None = None,
    ) -> None:
        """mlp_recompute, norm_recompute: make again in the backward pass what goes into the MLP's second layer, and
            what the norms give to each branch. As DiT-XL in 16 bits on Triton's kernels a block keeps 46,160 bytes a
            token without, 36,944 with the first, 41,552 with the second, 32,336 with both.
        adaln: how `adaLN_modulation` makes the block's tables: "zero", from the conditioning rows [M, C], or
        "single", from a modulation [M, 6C] (with cross-attention 9C) that the blocks share.
        eps: of every norm, that of the layer that follows and the QK-norm too. mlp_eps: of the norm before the MLP,
        where that has another (1e-5 in diffusers' DiT).
        """
        super().__init__()
        if adaln not in ("zero", "single"):
            raise ValueError(f'adaln: {adaln!r}; it must be "zero" or "single"')
        if mlp not in ("gelu", "swiglu"):
            raise ValueError(f'mlp: {mlp!r}; it must be "gelu" or "swiglu"')
        self.attn = PackedAttention(dim, heads, qk_norm=qk_norm, rope=rope, eps=eps)
        self.cross = None if context_dim is None else PackedCrossAttention(dim, heads, context_dim)
        self.mlp = (Mlp if mlp == "gelu" else SwiGLU)(dim, int(mlp_ratio * dim), recompute=mlp_recompute)
        self.norm_recompute = norm_recompute
        self.eps, self.mlp_eps = eps, eps if mlp_eps is None else mlp_eps
        modulation = AdaLNZero if adaln == "zero" else AdaLNSingle
        self.adaLN_modulation = modulation(dim, 6 if self.cross is None else 9)

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        modulation: tuple[Tensor, ...],
        following: tuple[Tensor, Tensor],
        shared: BlockContext,
        text: KeysValues | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x, h: [N, C] → the same for the next block.

        Both of one dtype, which under autocast is autocast's, as `PatchEmbed3D` gives it.
        modulation: what this block's `adaLN_modulation` gave, 6 or 9 tables [M, C]: shift, scale, gate of each branch.
        following: shift and scale [M, C] of the layer that comes next.
        text: what `cross.keys_values` made of `shared.text`, where that is made once for many calls.
        """
        rows = shared.rows
        branches = self._tables(modulation, following)
        branch = self.attn(
            self._normed(h, x, *branches[0][:2], rows, self.eps),
            shared.layout,
            shared.schedule,
            segment_scale=shared.segment_scale,
        )
        eps = self.mlp_eps if self.cross is None else self.eps
        x, h = gated_residual_adaln(x, branch, branches[0][2], *branches[1][:2], rows, eps=eps)
        if self.cross is not None:
            if shared.text is None:
                raise ValueError("shared.text: None, but this block has cross-attention; give packed text")
            h = self._normed(h, x, *branches[1][:2], rows, self.eps)
            branch = self.cross(h, text or shared.text, shared.layout, shared.text_layout, shared.text_schedule)
            x, h = gated_residual_adaln(x, branch, branches[1][2], *branches[2][:2], rows, eps=self.mlp_eps)
        branch = self.mlp(self._normed(h, x, *branches[-1][:2], rows, self.mlp_eps))
        return gated_residual_adaln(x, branch, branches[-1][2], *following, rows, eps=self.eps)

    def _tables(
        self, modulation: tuple[Tensor, ...], following: tuple[Tensor, Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Shift, scale and gate of each branch. ValueError for another number of tables."""
        count = 6 if self.cross is None else 9
        for name, given, wanted in (("modulation", modulation, count), ("following", following, 2)):
            if len(given) != wanted:
                raise ValueError(f"{name}: {len(given)} tables; this block takes {wanted}")
        return [tuple(modulation[first : first + 3]) for first in range(0, count, 3)]

    def _normed(
        self, h: Tensor, x: Tensor, shift: Tensor, scale: Tensor, rows: RowIndex, eps: float
    ) -> Tensor | Normed:
        return Normed(h, x, shift, scale, rows, eps) if self.norm_recompute and torch.is_grad_enabled() else h
