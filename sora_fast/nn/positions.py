"""Additive position embeddings; with RoPE a model needs none of them."""

import torch
from torch import Tensor, nn

from sora_fast.ops.patch_embed import FactorisedPosition
from sora_fast.packing import PackedLayout


class FractionalPosition(nn.Module):
    """Linear of Fourier features of the place as a fraction of the side (NaViT's fractional embedding, in 3D).

    Fractions do not grow with the resolution, so sizes never seen in training stay inside the trained range.
    """

    def __init__(self, dim: int, frequencies: int = 8) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.linear = nn.Linear(6 * frequencies, dim)

    def forward(self, layout: PackedLayout) -> Tensor:
        """→ [N, C]"""
        sides = layout.grids[layout.segment_ids.clamp(min=0).long()]
        fraction = (layout.coords.float() + 0.5) / sides.clamp(min=1)
        octaves = torch.pi * 2.0 ** torch.arange(self.frequencies, dtype=torch.float32, device=fraction.device)
        angles = (fraction[:, :, None] * octaves).flatten(1)
        return self.linear(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.linear.weight.dtype))


class FactorisedTables(nn.Module):
    """One learned table an axis, added up (NaViT's factorised embedding, in 3D)."""

    def __init__(self, dim: int, rows: tuple[int, int, int] = (256, 256, 256)) -> None:
        """rows: the largest grid (T, H, W) that the tables cover."""
        super().__init__()
        self.t, self.h, self.w = (nn.Parameter(torch.randn(size, dim) * 0.02) for size in rows)

    def forward(self, layout: PackedLayout) -> FactorisedPosition:
        return FactorisedPosition(self.t, self.h, self.w)


class SinCosPosition(nn.Module):
    """DiT's fixed 2D sin-cos embedding: the first half encodes the column, the second the row; time is not encoded.

    dtype: of the tables; None: torch's default, as weights have it, to which they are added.
    """

    def __init__(self, dim: int, max_side: int = 512, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        fixed = FactorisedPosition.sin_cos(dim, max_side, max_side)
        for axis, table in (("h", fixed.h), ("w", fixed.w)):
            self.register_buffer(axis, table.to(dtype or torch.get_default_dtype()), persistent=False)

    def forward(self, layout: PackedLayout) -> FactorisedPosition:
        return FactorisedPosition(h=self.h, w=self.w)


class SpacetimeSinCosPosition(nn.Module):
    """Fixed sin-cos embedding of frame, row and column: a quarter of the channels for the first, the rest halved.

    theta: pair i of an axis with d channels turns by theta^(−2i/d) radians a patch.
    """

    def __init__(self, dim: int, theta: float = 10000.0, max_side: int = 512) -> None:
        super().__init__()
        if dim % 16:
            raise ValueError(f"dim: {dim}; it must be a multiple of 16")
        sizes, end = (dim // 4, 3 * dim // 8, 3 * dim // 8), 0
        for axis, size in zip("thw", sizes, strict=True):
            frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
            angle = torch.arange(max_side, dtype=torch.float64)[:, None] * frequency
            table = torch.zeros(max_side, dim)
            table[:, end : end + size] = torch.cat([angle.sin(), angle.cos()], dim=1)
            self.register_buffer(axis, table, persistent=False)
            end += size

    def forward(self, layout: PackedLayout) -> FactorisedPosition:
        return FactorisedPosition(self.t, self.h, self.w)
