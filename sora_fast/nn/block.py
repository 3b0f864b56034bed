"""DiTBlock: adaLN-Zero self-attention, optional cross-attention to text, and MLP, joined by fused ops."""

from dataclasses import dataclass

from torch import Tensor, nn

from sora_fast.nn.adaln import AdaLNSingle, AdaLNZero
from sora_fast.nn.attention import PackedAttention, PackedCrossAttention
from sora_fast.nn.mlp import Mlp, SwiGLU
from sora_fast.ops.gated_residual_adaln import gated_residual_adaln
from sora_fast.ops.qk_norm_rope import Rope3D
from sora_fast.packing import PackedLayout, RowIndex
from sora_fast.schedule import TileSchedule


@dataclass(frozen=True)
class BlockContext:
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
    ) -> None:
        """mlp_recompute: make what goes into the MLP's second layer again in the backward pass: as DiT-XL in bf16, the
        block keeps 9,216 bytes a token of the 18,432 between the two layers.
        adaln: how `adaLN_modulation` makes the block's tables: "zero", from the conditioning rows [M, C], or
        "single", from a modulation [M, 6C] (with cross-attention 9C) that the blocks share.
        """
        super().__init__()
        if adaln not in ("zero", "single"):
            raise ValueError(f'adaln: {adaln!r}; it must be "zero" or "single"')
        if mlp not in ("gelu", "swiglu"):
            raise ValueError(f'mlp: {mlp!r}; it must be "gelu" or "swiglu"')
        self.attn = PackedAttention(dim, heads, qk_norm=qk_norm, rope=rope)
        self.cross = None if context_dim is None else PackedCrossAttention(dim, heads, context_dim)
        self.mlp = (Mlp if mlp == "gelu" else SwiGLU)(dim, int(mlp_ratio * dim), recompute=mlp_recompute)
        modulation = AdaLNZero if adaln == "zero" else AdaLNSingle
        self.adaLN_modulation = modulation(dim, 6 if self.cross is None else 9)

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        modulation: tuple[Tensor, ...],
        following: tuple[Tensor, Tensor],
        shared: BlockContext,
    ) -> tuple[Tensor, Tensor]:
        """x, h: [N, C] → the same for the next block.

        modulation: what this block's `adaLN_modulation` gave, 6 or 9 tables [M, C]: shift, scale, gate of each branch.
        following: shift and scale [M, C] of the layer that comes next.
        """
        rows = shared.rows
        _, _, gate, *rest = modulation
        branch = self.attn(h, shared.layout, shared.schedule, segment_scale=shared.segment_scale)
        x, h = gated_residual_adaln(x, branch, gate, *rest[:2], rows)
        if self.cross is not None:
            branch = self.cross(h, shared.text, shared.layout, shared.text_layout, shared.text_schedule)
            x, h = gated_residual_adaln(x, branch, rest[2], *rest[3:5], rows)
        return gated_residual_adaln(x, self.mlp(h), rest[-1], *following, rows)
