"""FinalLayer: packed tokens back to ragged latents."""

import math

from torch import Tensor, nn

from sora_fast.nn.adaln import AdaLNZero
from sora_fast.ops.unpatchify import unpatchify
from sora_fast.packing import PackedLayout, RaggedLatents


class FinalLayer(nn.Module):
    """Linear to pixels and scatter; zero at the start.

    Its adaLN has been applied by the last block's fused op, with the shift and scale that `adaLN_modulation` gives.
    """

    def __init__(self, dim: int, in_channels: int, patch_size: tuple[int, int, int], *, multiple: int = 1) -> None:
        """multiple: predicted channels for each of `in_channels`: 2 with a learned variance."""
        super().__init__()
        self.patch_size = patch_size
        self.multiple = multiple
        self.adaLN_modulation = AdaLNZero(dim, 2)
        self.linear = nn.Linear(dim, math.prod(patch_size) * in_channels * multiple)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor, layout: PackedLayout, like: RaggedLatents) -> RaggedLatents:
        """h: [N, C], modulated → videos of the sizes of `like` with `multiple` times its channels."""
        capacity = self.multiple * like.flat.shape[0]
        return unpatchify(self.linear(h), layout, self.patch_size, like, capacity=capacity)
