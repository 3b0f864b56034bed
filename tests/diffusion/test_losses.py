import math

import numpy as np
import pytest
import torch
from torch import nn

from sora_fast.diffusion import DDPM, RectifiedFlow, clean_frames, training_loss
from sora_fast.packing import PackedLayout, RaggedLatents
from tests.diffusion.stand_ins import PATCH, layout_of

VELOCITY = DDPM(prediction="velocity", zero_terminal_snr=True)


def random_pack(shapes, *, seed=0, spare=0, **options):
    """(data, noise, layout); what lies past the last video is NaN."""
    generator = torch.Generator().manual_seed(seed)
    capacity = sum(map(math.prod, shapes)) + 11 * spare
    places = len(shapes) + spare

    def ragged(scale):
        videos = [scale * torch.randn(shape, generator=generator) for shape in shapes]
        latents = RaggedLatents.from_list(videos, capacity=capacity, max_segments=places)
        latents.flat[latents.offsets[-1] :] = math.nan
        return latents

    data = ragged(0.5)
    layout = layout_of(data.to_list(), order="tiled", max_segments=places, tile_size=16, **options)
    return data, ragged(1.0), layout


class Affine(nn.Module):
    """Says a·x + b about every pixel, NaN past the last video, and keeps what it saw."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 0.8, channels))
        self.bias = nn.Parameter(torch.linspace(-0.1, 0.3, channels))

    def forward(self, latents, layout, conditioning):
        self.seen = latents, conditioning
        if len(self.weight) == 1:
            real = torch.arange(latents.flat.shape[0]) < latents.offsets[-1]
            x = torch.where(real, latents.flat, 0)
            return latents.with_flat(torch.where(real, x * self.weight + self.bias, math.nan))
        videos = [
            torch.cat([video * w + b for w, b in zip(self.weight, self.bias, strict=True)])
            for video in latents.to_list()
        ]
        size = latents.flat.shape[0] * len(self.weight)
        output = RaggedLatents.from_list(videos, capacity=size, max_segments=latents.max_segments)
        return output.with_flat(torch.where(torch.arange(size) < output.offsets[-1], output.flat, math.nan))


def expected_mse(path, data, noise, sigma, noisy) -> float:
    """noisy: one bool array a video."""
    total, count = 0.0, 0
    for i, (x0, eps) in enumerate(zip(data.to_list(), noise.to_list(), strict=True)):
        level = sigma[i].double()
        a, b = path.coefficients(level)
        x0, eps = x0.double(), eps.double()
        x = a * x0 + b * eps
        weight = 1.0
        if isinstance(path, RectifiedFlow):
            target = eps - x0 if path.prediction == "velocity" else x0
            weight = 1.0 if path.prediction == "velocity" else 1 / max(level.item(), path.least_sigma) ** 2
        else:
            target = eps if path.prediction == "epsilon" else a * eps - b * x0
        error = (0.5 * x - 0.1 - target)[torch.as_tensor(noisy[i])]
        total, count = total + weight * error.square().sum().item(), count + error.numel()
    return total / count


@pytest.mark.parametrize("path", [RectifiedFlow(), RectifiedFlow(prediction="clean"), DDPM(), VELOCITY], ids=repr)
def test_mean_over_noisy_real_pixels(path):
    shapes = [(2, 3, 5, 3), (2, 1, 4, 4), (2, 2, 1, 2)]
    # The image has lost the patch at its upper right.
    keep = [None, np.array([2, 0, 3]), None]
    data, noise, layout = random_pack(shapes, spare=1, keep=keep)
    sigma = torch.tensor([0.25, 0.9, 0.5, 0.1])
    clean = clean_frames(layout, torch.tensor([1, 0, 0, 0]), torch.tensor([0, 0, 1, 0]))
    noisy = [np.ones(shape, dtype=bool) for shape in shapes]
    noisy[0][:, 0] = False
    noisy[1][:, :, :2, 2:] = False
    noisy[2][:, 1] = False

    model = Affine()
    loss = training_loss(model, data, layout, path, sigma, noise=noise.flat, patch_size=PATCH, clean=clean)
    assert loss.item() == pytest.approx(expected_mse(path, data, noise, sigma, noisy), rel=1e-5)
    loss.backward()
    assert model.weight.grad.isfinite() and model.weight.grad != 0

    latents, conditioning = model.seen
    assert torch.equal(latents.to_list()[0][:, 0], data.to_list()[0][:, 0])
    assert not torch.isclose(latents.to_list()[0][:, 1], data.to_list()[0][:, 1]).all()
    levels = conditioning.sigma[conditioning.index][layout.segment_ids >= 0]
    wanted = torch.where(clean, 0, torch.cat([sigma, torch.zeros(1)])[layout.segment_ids])
    assert torch.equal(levels, wanted[layout.segment_ids >= 0])


def test_nothing_noisy_is_a_loss_of_zero():
    data, noise, layout = random_pack([(1, 2, 2, 2)])
    clean = torch.ones(layout.capacity, dtype=torch.bool)
    loss = training_loss(
        Affine(),
        data,
        layout,
        RectifiedFlow(),
        torch.ones(1),
        noise=noise.flat,
        patch_size=PATCH,
        clean=clean,
    )
    assert loss.item() == 0


def published_bound(x_start, x_t, t, eps, raw_variance) -> np.ndarray:
    """`_vb_terms_bpd` of improved-diffusion with learned range and unclipped ε-prediction, for one timestep."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alphas_cumprod = np.cumprod(1 - betas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
    log_variance_clipped = np.log(np.append(variance[1], variance[1:]))
    coef1 = betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod)
    coef2 = (1 - alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - alphas_cumprod)

    frac = (raw_variance + 1) / 2
    log_variance = frac * np.log(betas[t]) + (1 - frac) * log_variance_clipped[t]
    pred_xstart = np.sqrt(1 / alphas_cumprod[t]) * x_t - np.sqrt(1 / alphas_cumprod[t] - 1) * eps
    mean = coef1[t] * pred_xstart + coef2[t] * x_t
    true_mean = coef1[t] * x_start + coef2[t] * x_t
    kl = 0.5 * (
        -1.0
        + log_variance
        - log_variance_clipped[t]
        + np.exp(log_variance_clipped[t] - log_variance)
        + (true_mean - mean) ** 2 * np.exp(-log_variance)
    )

    def cdf(x):
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    centered, inv_stdv = x_start - mean, np.exp(-0.5 * log_variance)
    cdf_plus, cdf_min = cdf(inv_stdv * (centered + 1 / 255)), cdf(inv_stdv * (centered - 1 / 255))
    log_probs = np.where(
        x_start < -0.999,
        np.log(cdf_plus.clip(1e-12)),
        np.where(x_start > 0.999, np.log((1 - cdf_min).clip(1e-12)), np.log((cdf_plus - cdf_min).clip(1e-12))),
    )
    return (-log_probs if t == 0 else kl) / np.log(2)


@pytest.mark.parametrize("t", [0, 1, 2, 400, 999])
def test_learned_variance_adds_the_published_bound(t):
    path = DDPM(learned_variance=True)
    data, noise, layout = random_pack([(1, 2, 3, 4), (1, 1, 2, 2)], spare=1)
    data.flat[:3] = torch.tensor([-1.0, 1.0, 0.2])  # the outermost bins have their own rule
    model = Affine(channels=2)
    # A model that is about right at t = 0, so that the likelihood is no floor.
    if t == 0:
        noise.flat.mul_(0.3)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([0.001, 0.3]))
    sigma = torch.full((3,), (t + 1) / 1000)
    loss = training_loss(model, data, layout, path, sigma, noise=noise.flat, patch_size=PATCH)

    a, b = (c.item() for c in path.coefficients(sigma[0].double()))
    expected = []
    for x0, eps in zip(data.to_list(), noise.to_list(), strict=True):
        x0, eps = x0.double().numpy(), eps.double().numpy()
        x = a * x0 + b * eps
        (w0, w1), (b0, b1) = model.weight.tolist(), model.bias.tolist()
        said, raw = w0 * x + b0, w1 * x + b1
        bound = published_bound(x0, x, t, said, raw)
        assert bound.max() < 30  # not the floor of the likelihood, 1e-12
        expected.append(((said - eps) ** 2 + bound).ravel())
    assert loss.item() == pytest.approx(np.concatenate(expected).mean(), rel=2e-4)


def test_the_bound_trains_the_variance_alone():
    data, noise, layout = random_pack([(1, 2, 3, 4)], spare=1)
    sigma = torch.full((2,), 0.3)

    def gradient(path, channels):
        model = Affine(channels)
        training_loss(model, data, layout, path, sigma, noise=noise.flat, patch_size=PATCH).backward()
        return model.weight.grad

    plain, learned = gradient(DDPM(), 1), gradient(DDPM(learned_variance=True), 2)
    assert learned.isfinite().all() and learned[1] != 0
    torch.testing.assert_close(learned[0], plain[0])


@pytest.mark.parametrize("path", [RectifiedFlow(base_tokens=4), VELOCITY], ids=repr)
def test_one_graph_serves_every_mix_of_shapes(path):
    """Nothing that varies from batch to batch may be a Python number, and nothing may wait for the device."""
    model = Affine()

    def loss(data, noise, layout, sigma, clean):
        return training_loss(model, data, layout, path, sigma, noise=noise, patch_size=PATCH, clean=clean)

    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend="eager")
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shapes in ([(1, 2, 3, 4)], [(1, 1, 5, 5), (1, 3, 2, 2)], [(1, 1, 1, 1)] * 3):
            videos = [torch.randn(shape) for shape in shapes]
            data = RaggedLatents.from_list(videos, capacity=64, max_segments=3)
            layout = layout_of(videos, capacity=40, max_segments=3)
            generator = torch.Generator().manual_seed(0)
            batch = (
                data,
                torch.randn(64, generator=generator),
                layout,
                path.sample_sigma(layout, generator),
                torch.rand(40, generator=generator) < 0.3,
            )
            torch.testing.assert_close(compiled(*batch), loss(*batch))
            compiled(*batch).backward()


def test_errors_name_the_argument():
    data, noise, layout = random_pack([(1, 1, 2, 2)])
    sigma = torch.ones(1)
    with pytest.raises(ValueError, match=r"noise: shape \(3,\); it must be \(4,\)"):
        training_loss(Affine(), data, layout, DDPM(), sigma, noise=noise.flat[:3], patch_size=PATCH)
    with pytest.raises(ValueError, match=r"model: its output has 4 elements .* needs 8"):
        path = DDPM(learned_variance=True)
        training_loss(Affine(), data, layout, path, sigma, noise=noise.flat, patch_size=PATCH)
    with pytest.raises(ValueError, match="sigma: shape"):
        training_loss(Affine(), data, layout, DDPM(), torch.ones(2), noise=noise.flat, patch_size=PATCH)


def test_inputs_reach_the_model():
    data, noise, layout = random_pack([(1, 1, 2, 2)])

    def model(latents, layout: PackedLayout, conditioning, labels):
        assert labels == "given"
        return latents

    training_loss(model, data, layout, DDPM(), torch.ones(1), noise=noise.flat, patch_size=PATCH, labels="given")
