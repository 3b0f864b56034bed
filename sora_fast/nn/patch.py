"""PatchEmbed3D: ragged latents to packed tokens."""

import math

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
        return patch_embed(latents, self.proj.weight, self.proj.bias, layout, self.patch_size, position)
