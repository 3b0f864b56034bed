"""What conditions the model besides text: the noise level and a class label."""

import math

import torch
from torch import Tensor, nn


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, Linear, SiLU, Linear (DiT: [cos | sin], f_i = exp(−ln(10000)·i/half))."""

    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        """timestep: [M] float, on DiT's scale of 0 … 999 → [M, C]."""
        half = self.frequencies // 2
        steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angles = timestep.float()[:, None] * torch.exp(-math.log(10000) / half * steps)[None, :]
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of class embeddings; row `num_classes`, with `null_class`, is the label "none" that guidance needs."""

    def __init__(self, dim: int, num_classes: int, *, null_class: bool = True) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + null_class, dim)

    def forward(self, labels: Tensor) -> Tensor:
        """labels: [S] int → [S, C]"""
        return self.embedding_table(labels)
