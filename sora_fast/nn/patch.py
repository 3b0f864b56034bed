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
        weight, bias, flat = autocast(self.proj.weight, self.proj.bias, latents.flat)
        if isinstance(position, FactorisedPosition):
            position = FactorisedPosition(*autocast(*position.tables))
        else:
            (position,) = autocast(position)
        return patch_embed(latents.with_flat(flat), weight, bias, layout, self.patch_size, position)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As nn.Linear would be given them: the ops on patches are products, but not on autocast's list of such."""
    device = next((tensor.device.type for tensor in tensors if tensor is not None), "cpu")
    dtype = autocast_dtype(device)
    return tensors if dtype is None else tuple(tensor if tensor is None else tensor.to(dtype) for tensor in tensors)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast computes in there; None where it is off, or is none, as on "meta"."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
