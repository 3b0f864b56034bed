"""Gaussian noise for ragged latents."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sora_fast.packing import RaggedLatents

Generators = torch.Generator | Sequence[torch.Generator] | None


def noise_like(latents: RaggedLatents, generator: Generators = None) -> Tensor:
    """Standard normal noise in the shape, dtype and device of `latents.flat`, drawn where the generator lives.

    One generator for the whole pack; or one for each of the first videos, so that a video's noise does not depend on
    what is packed with it (this waits for the device, and videos beyond the generators get zeros).
    """
    flat = latents.flat
    if generator is None or isinstance(generator, torch.Generator):
        return _normal(flat.shape[0], flat, generator)
    if len(generator) > latents.max_segments:
        raise ValueError(f"generator: {len(generator)} generators, but there are {latents.max_segments} segments")
    sizes = latents.offsets.diff().tolist()
    parts = [_normal(size, flat, one) for one, size in zip(generator, sizes, strict=False)]
    rest = flat.shape[0] - sum(part.shape[0] for part in parts)
    return torch.cat([*parts, flat.new_zeros(rest)])


def _normal(size: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(size, generator=generator, dtype=like.dtype, device=device).to(like.device)
