import numpy as np
import pytest
import torch

from sora_fast.diffusion import DDPM, RectifiedFlow
from sora_fast.packing import PackedLayout
from tests.diffusion.published import space_timesteps

LAYOUT = PackedLayout.from_grids([(4, 8, 8), (1, 8, 8), (1, 2, 2)], max_segments=4)
PATHS = [
    RectifiedFlow(),
    DDPM(),
    DDPM(prediction="velocity"),
    DDPM(prediction="velocity", zero_terminal_snr=True),
    RectifiedFlow(prediction="clean"),
]


def linear_alpha_bar() -> np.ndarray:
    """ᾱ after 1 … 1000 steps, as in the published code."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def at_timestep(t: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((np.asarray(t) + 1) / 1000)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("sigma", [0.001, 0.37, 0.999, 1.0])
def test_the_target_gives_back_data_and_noise(path, sigma):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    level = torch.full((50,), sigma, dtype=torch.float64)
    x = path.add_noise(clean, noise, level)
    got_clean, got_noise = path.denoise(x, path.target(clean, noise, level), level)
    torch.testing.assert_close(got_clean, clean, rtol=0, atol=1e-10)
    torch.testing.assert_close(got_noise, noise, rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_sigma_zero_is_clean(path):
    clean, noise = torch.randn(2, 9)
    assert torch.equal(path.add_noise(clean, noise, torch.zeros(9)), clean)


@pytest.mark.parametrize("path", [PATHS[0], PATHS[3]], ids=repr)
def test_sigma_one_is_pure_noise(path):
    clean, noise = torch.randn(2, 9)
    assert torch.equal(path.add_noise(clean, noise, torch.ones(9)), noise)


def test_an_error_of_clean_data_counts_as_the_error_of_the_velocity_that_follows():
    path = RectifiedFlow(prediction="clean", least_sigma=0.2)
    sigma = torch.tensor([0.2, 0.5, 1.0])
    clean, noise, wrong = torch.randn(3, 3)
    x = path.add_noise(clean, noise, sigma)
    velocity = torch.sub(*reversed(path.denoise(x, wrong, sigma)))
    torch.testing.assert_close(
        path.loss_weight(sigma) * (wrong - clean).square(), (velocity - (noise - clean)).square()
    )
    assert path.loss_weight(torch.zeros(1)).item() == pytest.approx(25)


def test_ddpm_has_the_published_coefficients():
    t = np.array([0, 1, 250, 999])
    a, b = DDPM().coefficients(at_timestep(t))
    alpha_bar = linear_alpha_bar()[t]
    np.testing.assert_allclose(a, np.sqrt(alpha_bar), rtol=1e-12)
    np.testing.assert_allclose(b, np.sqrt(1 - alpha_bar), rtol=1e-9)


def test_zero_terminal_snr_is_the_published_rescaling():
    # Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    root = np.sqrt(linear_alpha_bar())
    first, last = root[0], root[-1]
    rescaled = (root - last) * first / (first - last)
    path = DDPM(prediction="velocity", zero_terminal_snr=True)
    a, _ = path.coefficients(at_timestep(np.arange(1000)))
    np.testing.assert_allclose(a, rescaled, rtol=1e-10, atol=1e-15)
    assert a[-1] == 0 and a[0] == pytest.approx(first)


def test_posterior_is_the_published_one():
    t = np.array([1, 2, 500, 999])
    alpha_bar = linear_alpha_bar()
    beta = np.linspace(1e-4, 0.02, 1000)[t]
    now, before = alpha_bar[t], alpha_bar[t - 1]
    posterior = DDPM().posterior(at_timestep(t), at_timestep(t - 1))
    np.testing.assert_allclose(posterior.clean, beta * np.sqrt(before) / (1 - now), rtol=1e-9)
    np.testing.assert_allclose(posterior.x, (1 - before) * np.sqrt(1 - beta) / (1 - now), rtol=1e-9)
    np.testing.assert_allclose(posterior.log_variance, np.log(beta * (1 - before) / (1 - now)), rtol=1e-9)
    np.testing.assert_allclose(posterior.log_beta, np.log(beta), rtol=1e-9)


def test_posterior_to_clean_data_is_the_clean_data():
    posterior = DDPM().posterior(at_timestep(np.array([0, 9])), torch.zeros(2, dtype=torch.float64))
    np.testing.assert_allclose(posterior.clean, 1)
    assert (posterior.x == 0).all() and posterior.log_variance.isfinite().all()


def test_flow_shift_depends_on_the_token_count():
    path = RectifiedFlow(base_tokens=64)
    s = np.array([2, 1, 0.25])
    for sigma in (0.1, 0.5, 0.9):
        got = path.shift(torch.full((4,), sigma, dtype=torch.float64), LAYOUT)
        np.testing.assert_allclose(got[:3], s * sigma / (1 + (s - 1) * sigma))
    ends = path.shift(torch.tensor([[0.0], [1.0]]).expand(2, 4), LAYOUT)
    assert torch.equal(ends, torch.tensor([[0.0], [1.0]]).expand(2, 4))


def test_flow_shift_does_not_depend_on_dropped_tokens():
    thinned = PackedLayout.from_grids([(4, 8, 8)], keep=[np.arange(5)])
    whole = PackedLayout.from_grids([(4, 8, 8)])
    path, sigma = RectifiedFlow(base_tokens=64), torch.tensor([0.3])
    assert torch.equal(path.shift(sigma, thinned), path.shift(sigma, whole))


def test_training_levels_of_the_flow_are_logit_normal():
    layout = PackedLayout.from_grids([(1, 1, 1)] * 5000)
    path = RectifiedFlow(mean=-0.5, std=1.5, base_tokens=1)
    logits = torch.logit(path.sample_sigma(layout, torch.Generator().manual_seed(0)))
    assert logits.mean().item() == pytest.approx(-0.5, abs=0.07)
    assert logits.std().item() == pytest.approx(1.5, abs=0.07)


def test_training_levels_are_shifted_too():
    layout = PackedLayout.from_grids([(4, 8, 8)])
    plain, shifted = (
        path.sample_sigma(layout, torch.Generator().manual_seed(3))
        for path in (RectifiedFlow(), RectifiedFlow(base_tokens=64))
    )
    assert shifted.item() == pytest.approx(2 * plain.item() / (1 + plain.item()))


def test_training_levels_of_ddpm_are_its_steps():
    layout = PackedLayout.from_grids([(1, 1, 1)] * 1000)
    path = DDPM(steps=20)
    timesteps = path.step(path.sample_sigma(layout, torch.Generator().manual_seed(0))) - 1
    assert set(timesteps.tolist()) == set(range(20))


def test_levels_fall_from_the_start_to_zero():
    for path in (*PATHS, RectifiedFlow(base_tokens=16)):
        for start in (1.0, 0.6):
            sigmas = path.sigmas(7, LAYOUT, start=start)
            assert sigmas.shape == (8, 4)
            assert (sigmas.diff(dim=0) < 0).all()
            assert (sigmas[0] == start).all() and (sigmas[-1] == 0).all()


@pytest.mark.parametrize("steps", [1, 3, 16, 21, 43, 50, 250, 1000])
def test_ddpm_spacings_are_the_published_ones(steps):
    def timesteps(spacing: str) -> list[int]:
        sigmas = DDPM().sigmas(steps, LAYOUT, spacing=spacing)
        return (DDPM().step(sigmas[:-1, 0]) - 1).tolist()

    # Lin et al., section 3.3.
    assert timesteps("trailing") == [round(1000 * (1 - i / steps)) - 1 for i in range(steps)]
    assert timesteps("linspace") == (space_timesteps(steps)[::-1] if steps > 1 else [999])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RectifiedFlow(prediction="noise"), "prediction: 'noise'"),
        (lambda: RectifiedFlow(least_sigma=0), "least_sigma: 0"),
        (lambda: RectifiedFlow(std=0), "std: 0"),
        (lambda: RectifiedFlow(base_tokens=0), "base_tokens: 0"),
        (lambda: DDPM(prediction="x0"), "prediction: 'x0'"),
        (lambda: DDPM(zero_terminal_snr=True), "zero_terminal_snr"),
        (lambda: DDPM(beta_start=0.1), "beta_start"),
        (lambda: DDPM().sigmas(1001, LAYOUT), "steps: 1001"),
        (lambda: DDPM().sigmas(11, LAYOUT, start=0.01), "has 10 steps"),
        (lambda: RectifiedFlow().sigmas(0, LAYOUT), "steps: 0"),
        (lambda: RectifiedFlow().sigmas(5, LAYOUT, start=1.5), "start: 1.5"),
        (lambda: DDPM().sigmas(5, LAYOUT, spacing="even"), "spacing: 'even'"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_late_levels_are_nearer_to_the_data_and_nest() -> None:
    """Half as many steps go through every other level: what a flow map is taught for one count holds for another."""
    layout = PackedLayout.from_grids([(1, 2, 2), (3, 4, 5)])
    for path in (RectifiedFlow(), RectifiedFlow(base_tokens=4)):
        late, even = (path.sigmas(8, layout, spacing=spacing) for spacing in ("late", "trailing"))
        assert (late[1:-1] < even[1:-1]).all() and (late[0] == 1).all() and (late[-1] == 0).all()
        torch.testing.assert_close(late[::2], path.sigmas(4, layout, spacing="late"), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="spacing: 'linspace'; it must be one of trailing, late"):
        RectifiedFlow().sigmas(4, layout, spacing="linspace")
    with pytest.raises(ValueError, match="it must be one of trailing, linspace"):
        DDPM().sigmas(4, layout, spacing="late")
