import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sora_fast.diffusion import (
    DDIM,
    DDPM,
    Ancestral,
    DPMSolver2M,
    Euler,
    Heun,
    RectifiedFlow,
    clean_frames,
    noise_like,
    sample,
)
from sora_fast.packing import RaggedLatents
from tests.diffusion.stand_ins import PATCH, GaussianModel, layout_of

FLOW = RectifiedFlow(base_tokens=8)
VELOCITY = DDPM(prediction="velocity", zero_terminal_snr=True)
SHAPES = [(2, 3, 5, 4), (2, 1, 3, 3)]


def pack(*, dtype=torch.float64, shapes=SHAPES):
    latents = RaggedLatents.empty(
        shapes, capacity=sum(map(math.prod, shapes)) + 7, max_segments=len(shapes) + 1, dtype=dtype
    )
    noise = latents.with_flat(noise_like(latents, torch.Generator().manual_seed(0)))
    layout = layout_of(latents.to_list(), order="tiled", max_segments=len(shapes) + 1, tile_size=16)
    return noise, layout


def real(latents: RaggedLatents) -> torch.Tensor:
    return torch.cat([video.flatten() for video in latents.to_list()])


CLEAN = RectifiedFlow(base_tokens=8, prediction="clean")


def error(path, sampler, steps: int) -> float:
    """Distance from the exact end of the probability flow, over two videos with their own schedules."""
    noise, layout = pack()
    model = GaussianModel(path)
    result = sample(model, noise, layout, path, sampler, steps=steps, patch_size=PATCH)
    exact = model.flow_to_data(real(noise), torch.ones(1, dtype=torch.float64))
    return (real(result) - exact).abs().max().item()


@pytest.mark.parametrize("path", [FLOW, CLEAN], ids=["velocity", "clean"])
@pytest.mark.parametrize(("sampler", "order"), [(Euler(), 1), (DDIM(), 1), (Heun(), 2)])
def test_convergence_order_on_the_flow(path, sampler, order):
    coarse, fine = error(path, sampler, 40), error(path, sampler, 160)
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.1)


@dataclass(frozen=True)
class Between(RectifiedFlow):
    """From σ = 0.9 to 0.1 in equal steps of log((1 − σ)/σ), the variable in which DPM-Solver++ is second order: at the
    ends it is infinite, and the order of a whole run comes out a logarithm short."""

    def sigmas(self, steps, layout, *, start=1.0, spacing="trailing"):
        log_snr = torch.linspace(-math.log(9), math.log(9), steps + 1, dtype=torch.float64)
        return torch.sigmoid(-log_snr)[:, None].expand(-1, layout.max_segments)


def test_convergence_order_of_dpm_solver():
    model = GaussianModel(FLOW)
    noise, layout = pack()
    high, low = torch.tensor([[0.9], [0.1]], dtype=torch.float64)
    offset = real(noise) - (1 - high) * model.mean
    exact = (1 - low) * model.mean + model.total(low) / model.total(high) * offset

    def distance(steps: int) -> float:
        result = sample(model, noise, layout, Between(), DPMSolver2M(), steps=steps, patch_size=PATCH)
        return (real(result) - exact).abs().max().item()

    assert math.log2(distance(128) / distance(256)) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize(("sampler", "order"), [(DDIM(), 1), (DPMSolver2M(), 2)])
@pytest.mark.parametrize("path", [DDPM(), VELOCITY], ids=["epsilon", "velocity"])
def test_convergence_order_on_ddpm(sampler, order, path):
    coarse, fine = error(path, sampler, 25), error(path, sampler, 100)
    assert math.log(coarse / fine, 4) > 0.8 * order


def test_ddim_and_euler_are_the_same_on_the_flow():
    noise, layout = pack()
    euler, ddim = (
        sample(GaussianModel(FLOW), noise, layout, FLOW, sampler, steps=5, patch_size=PATCH)
        for sampler in (Euler(), DDIM())
    )
    torch.testing.assert_close(real(euler), real(ddim), rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", [DDPM(), VELOCITY], ids=["epsilon", "velocity"])
def test_ancestral_sampling_has_the_moments_of_its_chain(path):
    """With a Gaussian model every step is linear, so the published recursion gives mean and variance exactly."""
    steps = 20
    noise, layout = pack(dtype=torch.float32, shapes=[(1, 5, 30, 40)])
    model = GaussianModel(path)
    generator = torch.Generator().manual_seed(1)
    result = sample(model, noise, layout, path, Ancestral(), steps=steps, patch_size=PATCH, generator=generator)

    taken = [round(i * 999 / (steps - 1)) for i in range(steps)]
    alpha_bar = path.alpha_bar(torch.device("cpu"))[1:][taken].numpy()
    before = np.append(1, alpha_bar[:-1])
    mean, variance = 0.0, 1.0
    for now, then in reversed(list(zip(alpha_bar, before, strict=True))):
        beta = 1 - now / then
        gain = np.sqrt(now) * model.std**2 / (now * model.std**2 + 1 - now)  # of the clean estimate in x
        to_clean, to_x = np.sqrt(then) * beta / (1 - now), np.sqrt(now / then) * (1 - then) / (1 - now)
        slope = to_clean * gain + to_x
        mean = slope * mean + to_clean * model.mean * (1 - gain * np.sqrt(now))
        variance = slope**2 * variance + beta * (1 - then) / (1 - now) * (then < 1)
    assert real(result).mean().item() == pytest.approx(mean, abs=0.015)
    assert real(result).std().item() == pytest.approx(np.sqrt(variance), rel=0.03)
    assert np.sqrt(variance) < 0.27  # far from the data's 0.3: a wrong variance would show


def test_learned_variance_makes_a_short_chain_exact():
    """With the true variance of each step, twelve steps keep the data's spread, which the posterior's would not."""
    path, steps = DDPM(learned_variance=True), 12
    noise, layout = pack(dtype=torch.float32, shapes=[(1, 5, 40, 50)])
    levels = path.sigmas(steps, layout, spacing="linspace")[:, 0]
    model = GaussianModel(path)

    def raw_variance(sigma):
        now = sigma.max()
        then = levels[levels < now - 1e-4].max()
        _, b = path.coefficients(now)
        posterior = path.posterior(now, then)
        unknown = (model.std * b / model.total(now)).square()
        wanted = (posterior.log_variance.exp() + posterior.clean.square() * unknown).log()
        share = (wanted - posterior.log_variance) / (posterior.log_beta - posterior.log_variance)
        return (2 * share - 1).expand_as(sigma)

    model.variance = raw_variance
    generator = torch.Generator().manual_seed(1)
    result = sample(model, noise, layout, path, Ancestral(), steps=steps, patch_size=PATCH, generator=generator)
    assert real(result).mean().item() == pytest.approx(0.7, abs=0.015)
    assert real(result).std().item() == pytest.approx(0.3, rel=0.02)


class Watched(GaussianModel):
    """Keeps what the model was shown."""

    def __call__(self, latents, layout, conditioning):
        self.seen = [*getattr(self, "seen", []), (latents, conditioning)]
        return super().__call__(latents, layout, conditioning)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("path", "sampler"),
    [
        (FLOW, Euler()),
        (FLOW, Heun()),
        (FLOW, DPMSolver2M()),
        (VELOCITY, DPMSolver2M()),
        (DDPM(), DDIM()),
        (DDPM(), Ancestral()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_clean_tokens_come_back_bit_identical(path, sampler, dtype):
    noise, layout = pack(dtype=dtype)
    data = noise.with_flat(torch.linspace(-1, 1, noise.flat.shape[0]).to(dtype))
    data.flat[:3] = torch.tensor([-0.0, 1e-30, 3.0])
    clean = clean_frames(layout, torch.tensor([1, 0, 0]), torch.tensor([1, 0, 0]))
    model = Watched(path)
    result = sample(model, noise, layout, path, sampler, steps=4, patch_size=PATCH, data=data, clean=clean)
    (video, image), (kept, _) = result.to_list(), data.to_list()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert result.flat.dtype == dtype
    assert torch.equal(video[:, [0, 2]].view(bits), kept[:, [0, 2]].view(bits))
    assert not torch.isclose(video[:, 1], kept[:, 1]).any() and image.isfinite().all()
    for latents, conditioning in model.seen:
        assert torch.equal(latents.to_list()[0][:, [0, 2]], kept[:, [0, 2]].to(latents.flat.dtype))
        assert (conditioning.sigma[conditioning.index[clean]] == 0).all()
        assert (conditioning.sigma[conditioning.index[~clean & (layout.segment_ids >= 0)]] > 0).all()


def test_a_start_below_one_begins_with_the_data():
    noise, layout = pack()
    data = noise.with_flat(torch.linspace(-1, 1, noise.flat.shape[0], dtype=torch.float64))
    model = GaussianModel(FLOW)
    options = {"patch_size": PATCH, "data": data, "start": 0.4}
    result = sample(model, noise, layout, FLOW, Heun(), steps=200, **options)
    level = torch.tensor([0.4], dtype=torch.float64)
    exact = model.flow_to_data(0.6 * real(data) + 0.4 * real(noise), level)
    torch.testing.assert_close(real(result), exact, rtol=0, atol=1e-4)


def test_generators_make_a_video_independent_of_its_pack():
    def run(shapes, seeds):
        noise, layout = pack(shapes=shapes)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = noise.with_flat(noise_like(noise, generators))
        result = sample(
            GaussianModel(DDPM()),
            noise,
            layout,
            DDPM(),
            Ancestral(),
            steps=3,
            patch_size=PATCH,
            generator=generators,
        )
        return result.to_list()

    torch.testing.assert_close(run(SHAPES, [5, 6])[1], run(SHAPES[1:], [6])[0], rtol=0, atol=1e-12)


def test_progress_is_told_after_every_step():
    noise, layout = pack()
    told = []
    sample(
        GaussianModel(FLOW),
        noise,
        layout,
        FLOW,
        Heun(),
        steps=3,
        patch_size=PATCH,
        progress=lambda done, steps: told.append((done, steps)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_errors_name_the_argument():
    noise, layout = pack()

    def run(path=FLOW, sampler=None, noise=noise, **options):
        sample(GaussianModel(path), noise, layout, path, sampler or DDIM(), steps=2, patch_size=PATCH, **options)

    with pytest.raises(TypeError, match="Euler needs a RectifiedFlow path, not DDPM"):
        run(DDPM(), Euler())
    with pytest.raises(TypeError, match="Ancestral needs a DDPM path"):
        run(FLOW, Ancestral())
    with pytest.raises(ValueError, match="data: None"):
        run(start=0.5)
    with pytest.raises(ValueError, match=r"data: .*float32; it must be as the noise"):
        run(data=noise.with_flat(noise.flat.float()))
    with pytest.raises(ValueError, match="noise: 1 segments, but the layout has 3"):
        run(noise=RaggedLatents.empty([(1, 1, 2, 2)]))
    with pytest.raises(ValueError, match="learned_variance=True needs"):
        run(DDPM(learned_variance=True))
