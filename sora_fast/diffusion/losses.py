"""The training loss over a pack: static shapes, nothing read back to the host, so that it compiles once."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sora_fast.diffusion.paths import DDPM, NoisePath
from sora_fast.diffusion.pixels import PatchSize, channel_half, pixel_segments, spread, token_to_pixels
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents

Model = Callable[..., RaggedLatents]


def training_loss(
    model: Model,
    data: RaggedLatents,
    layout: PackedLayout,
    path: NoisePath,
    sigma: Tensor,
    *,
    noise: Tensor,
    patch_size: PatchSize,
    clean: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """Mean squared error of the model's prediction over the noisy pixels, weighted by the path; a scalar.

    State, noise, targets and the loss are float32 (of float64 data that), whatever the model computes in: its noisy
    latents are so, and its output is widened.

    model: called with (noisy latents, layout, conditioning, **inputs), inputs being text or labels.
    data: clean latents; sigma: [S] noise level of each segment; noise: as data.flat.
    clean: [N] bool, tokens that are given to the model as they are, at noise level 0, and are no part of the loss.
    Pixels whose token was dropped are no part of it either. A path with learned variance adds the variational bound,
    through which only the variance is trained.
    """
    options = {"noise": noise, "patch_size": patch_size, "clean": clean}
    return counted_loss(model, data, layout, path, sigma, **options, **inputs)[0]


def counted_loss(
    model: Model,
    data: RaggedLatents,
    layout: PackedLayout,
    path: NoisePath,
    sigma: Tensor,
    *,
    noise: Tensor,
    patch_size: PatchSize,
    clean: Tensor | None = None,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """`training_loss`, and the number of pixels that it is the mean over, [] int64: a mean over several packs weighs
    those of the packs by it."""
    if noise.shape != data.flat.shape:
        raise ValueError(f"noise: shape {tuple(noise.shape)}; it must be {tuple(data.flat.shape)}, as data.flat")
    if clean is None:
        clean = torch.zeros(layout.capacity, dtype=torch.bool, device=layout.device)
    conditioning = Conditioning.with_clean(sigma, clean, layout)
    wide = torch.promote_types(data.flat.dtype, torch.float32)
    data, noise = data.with_flat(data.flat.to(wide)), noise.to(wide)
    noisy = token_to_pixels(~clean, layout, patch_size, data)
    segments = pixel_segments(data)
    level = spread(sigma, segments)
    x = torch.where(noisy, path.add_noise(data.flat, noise, level), data.flat)
    output = model(data.with_flat(x), layout, conditioning, **inputs)
    prediction, variance = split_output(output, data, path)
    prediction = prediction.to(wide)
    pixels = noisy.sum()
    divisor = pixels.clamp(min=1)
    # Masked before the square, and the variance before the bound: what stands in unspecified places, NaN perhaps,
    # must not reach the gradient.
    error = torch.where(noisy, prediction - path.target(data.flat, noise, level), 0)
    loss = (error.square() * path.loss_weight(level)).sum() / divisor
    if variance is None:
        return loss, pixels
    variance = torch.where(noisy, variance.to(wide), 0)
    denoised, _ = path.denoise(x, prediction.detach(), level)
    bound = variational_bound(path, data.flat, x, denoised, variance, sigma, segments)
    return loss + torch.where(noisy, bound, 0).sum() / divisor, pixels


def split_output(output: RaggedLatents, like: RaggedLatents, path: NoisePath) -> tuple[Tensor, Tensor | None]:
    """The model's prediction and, for a path with learned variance, its variance; each laid out as `like.flat`."""
    size = like.flat.shape[0] * (2 if path.learned_variance else 1)
    if output.flat.shape[0] != size:
        raise ValueError(
            f"model: its output has {output.flat.shape[0]} elements for an input of {like.flat.shape[0]}; "
            f"{type(path).__name__} with learned_variance={path.learned_variance} needs {size}"
        )
    if not path.learned_variance:
        return output.flat, None
    return channel_half(output, like, 0), channel_half(output, like, 1)


def variational_bound(
    path: DDPM, clean: Tensor, x: Tensor, denoised: Tensor, variance: Tensor, sigma: Tensor, segments: Tensor
) -> Tensor:
    """Bits per element of one step of the variational bound (improved-diffusion's `_vb_terms_bpd`, which DiT uses).

    clean, x, denoised, variance: [P]; variance: the model's second half, −1 … 1 between the bounds of the log variance.
    sigma: [S]; segments: [P], see `pixel_segments`. KL between the true and the predicted step; at the first timestep
    the likelihood of the data in 255 bins over [−1, 1].
    """
    sigma = sigma.double()
    step = 1 / path.steps
    true = path.posterior(sigma, sigma - step)
    # The step at timestep 0 has no variance; it borrows that of the next one.
    least = path.posterior(sigma.clamp(min=2 * step), sigma.clamp(min=2 * step) - step).log_variance

    def to_pixels(values: Tensor) -> Tensor:
        return spread(values.float(), segments)

    low, high = to_pixels(least), to_pixels(true.log_beta)
    share = (variance + 1) / 2
    log_variance = share * high + (1 - share) * low
    mean_gap = to_pixels(true.clean) * (clean - denoised)
    kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + mean_gap.square() * (-log_variance).exp())
    mean = to_pixels(true.clean) * denoised + to_pixels(true.x) * x
    likelihood = _binned_log_likelihood(clean, mean, 0.5 * log_variance)
    first = spread(path.step(sigma) == 1, segments)
    return torch.where(first, -likelihood, kl) / math.log(2)


def _binned_log_likelihood(value: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the 1/255-wide-half bin around `value`; the outermost bins reach to infinity."""
    centered, sharpness = value - mean, (-log_std).exp()
    upper = _normal_cdf(sharpness * (centered + 1 / 255))
    lower = _normal_cdf(sharpness * (centered - 1 / 255))
    probability = torch.where(value > 0.999, 1 - lower, upper - lower)
    return torch.where(value < -0.999, upper, probability).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    # The approximation of the original, so that losses agree with it.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
