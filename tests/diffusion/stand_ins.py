"""Models whose right answers are known in closed form."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_fast.diffusion import NoisePath
from sora_fast.diffusion.pixels import token_to_pixels
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents

PATCH = (1, 2, 2)


def pixel_sigma(latents: RaggedLatents, layout: PackedLayout, conditioning: Conditioning) -> Tensor:
    """The noise level that the model is told, for every pixel: [P] float64."""
    levels = torch.cat([conditioning.sigma, conditioning.sigma.new_zeros(1)]).double()
    return token_to_pixels(levels[conditioning.index], layout, PATCH, latents)


def layout_of(videos: list[Tensor], **options) -> PackedLayout:
    grids = [tuple(-(-size // p) for size, p in zip(v.shape[1:], PATCH, strict=True)) for v in videos]
    return PackedLayout.from_grids(grids, **options)


@dataclass
class GaussianModel:
    """The best possible model for data whose pixels are independent normal variables."""

    path: NoisePath
    mean: float = 0.7
    std: float = 0.3
    variance: Callable[[Tensor], Tensor] | None = None
    """The raw variance output at sigma [P], for a path with learned variance."""

    def __call__(self, latents: RaggedLatents, layout: PackedLayout, conditioning: Conditioning) -> RaggedLatents:
        sigma = pixel_sigma(latents, layout, conditioning)
        x = latents.flat.double()
        a, b = self.path.coefficients(sigma)
        clean = self.mean + a * self.std**2 / self.total(sigma).square() * (x - a * self.mean)
        noise = (x - a * clean) / b.clamp(min=1e-300)
        prediction = latents.with_flat(self.path.target(clean, noise, sigma).to(latents.flat.dtype))
        if self.variance is None:
            return prediction
        raw = latents.with_flat(self.variance(sigma).to(latents.flat.dtype))
        both = [torch.cat(pair) for pair in zip(prediction.to_list(), raw.to_list(), strict=True)]
        return RaggedLatents.from_list(both, capacity=2 * latents.flat.shape[0], max_segments=latents.max_segments)

    def total(self, sigma: Tensor) -> Tensor:
        """Standard deviation of the state at sigma."""
        a, b = self.path.coefficients(sigma)
        return (a.square() * self.std**2 + b.square()).sqrt()

    def flow_to_data(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Where the exact probability flow takes the state x at sigma."""
        a, _ = self.path.coefficients(sigma)
        return self.mean + self.std * (x - a * self.mean) / self.total(sigma)
