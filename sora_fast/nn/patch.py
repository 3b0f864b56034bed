"""PatchEmbed3D: ragged latents to packed tokens."""

import math

import torch
from torch import Tensor, nn

from sora_fast.ops.patch_embed import FactorisedPosition, patch_embed
from sora_fast.packing import PackedLayout, RaggedLatents


class PatchEmbed3D(nn.Module):
    """One linear map from each (in_channels, pt, ph, pw) block of pixels to a token; state dict: proj."""

    def __init__(self, dim: int, in_channels: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_channels * math.prod(patch_size), dim)

    def forward(
        self, latents: RaggedLatents, layout: PackedLayout, position: Tensor | FactorisedPosition | None = None
    ) -> Tensor:
        """→ [N, C] in the layout's order, with `position` added."""
        weight, bias, flat = self.proj.weight, self.proj.bias, latents.flat
        if torch.is_autocast_enabled(flat.device.type):
            # The op is not on autocast's list of matrix products: what nn.Linear would be given, it gets from here.
            dtype = torch.get_autocast_dtype(flat.device.type)
            weight, bias, flat = weight.to(dtype), bias.to(dtype), flat.to(dtype)
            position = _cast(position, dtype)
        return patch_embed(latents.with_flat(flat), weight, bias, layout, self.patch_size, position)


def _cast(position: Tensor | FactorisedPosition | None, dtype: torch.dtype) -> Tensor | FactorisedPosition | None:
    if isinstance(position, FactorisedPosition):
        return FactorisedPosition(*(table if table is None else table.to(dtype) for table in position.tables))
    return position if position is None else position.to(dtype)
