"""The two feed-forward branches of a block."""

import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear (DiT)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] → [N, C]"""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Linear to two halves, SiLU of the first times the second, Linear (Shazeer 2020).

    Two thirds of the hidden width, in steps of 8, so that it has the parameters of `Mlp`.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        width = -(-2 * hidden // 24) * 8
        self.fc1 = nn.Linear(dim, 2 * width)
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] → [N, C]"""
        gate, value = self.fc1(x).chunk(2, dim=1)
        return self.fc2(F.silu(gate) * value)
