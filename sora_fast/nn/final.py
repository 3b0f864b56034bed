"""FinalLayer: packed tokens back to ragged latents."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from sora_fast.nn.adaln import AdaLNZero
from sora_fast.nn.patch import autocast
from sora_fast.ops.linear_unpatchify import linear_unpatchify
from sora_fast.ops.unpatchify import unpatchify
from sora_fast.packing import PackedLayout, RaggedLatents


@dataclass(frozen=True)
class FinalLayerConfig:
    """Which of two ways the pixels take; benchmarks/cases.py has both.

    fused: the product writes them itself (`linear_unpatchify`). Not measured yet: it saves a launch and two passes over
        the rows, 4·K of the 2·C + 6·K bytes a token in bf16, and pays with a product that is not cuBLAS's.
    """

    fused: bool = False


class FinalLayer(nn.Module):
    """Linear to pixels and scatter; zero at the start.

    Its adaLN has been applied by the last block's fused op, with the shift and scale that `adaLN_modulation` gives.
    """

    def __init__(
        self,
        dim: int,
        in_channels: int,
        patch_size: tuple[int, int, int],
        *,
        multiple: int = 1,
        config: FinalLayerConfig = FinalLayerConfig(),
    ) -> None:
        """multiple: predicted channels for each of `in_channels`: 2 with a learned variance."""
        super().__init__()
        self.patch_size = patch_size
        self.multiple = multiple
        self.config = config
        self.adaLN_modulation = AdaLNZero(dim, 2)
        self.linear = nn.Linear(dim, math.prod(patch_size) * in_channels * multiple)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor, layout: PackedLayout, like: RaggedLatents) -> RaggedLatents:
        """h: [N, C], modulated → videos of the sizes of `like` with `multiple` times its channels."""
        capacity = self.multiple * like.flat.shape[0]
        if self.config.fused:
            h, weight, bias = autocast(h, self.linear.weight, self.linear.bias)
            return linear_unpatchify(h, weight, bias, layout, self.patch_size, like, capacity=capacity)
        return unpatchify(self.linear(h), layout, self.patch_size, like, capacity=capacity)
