"""Videos to write and read."""

import torch
from torch import Tensor


def smooth_video(channels: int = 3, frames: int = 10, height: int = 48, width: int = 64) -> Tensor:
    """A video that H.264 keeps almost as it is: slow waves, other ones in each channel and frame."""
    c, t, y, x = torch.meshgrid(*map(torch.arange, (channels, frames, height, width)), indexing="ij")
    return torch.sin(y / 15 + c + t / 9) * torch.cos(x / 20 - c - t / 5)


def noise(channels: int = 1, frames: int = 6, height: int = 12, width: int = 16) -> Tensor:
    return torch.rand(channels, frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
