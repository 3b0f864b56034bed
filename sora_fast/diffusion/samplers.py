"""From noise to data: one driver, and the step of each sampler.

A step moves a pack from one noise level per segment to the next lower one. Clean pixels are put back before every call
of the model and at the end, so they return bit for bit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sora_fast.diffusion.losses import split_output
from sora_fast.diffusion.noise import Generators, noise_like
from sora_fast.diffusion.paths import DDPM, NoisePath, RectifiedFlow
from sora_fast.diffusion.pixels import PatchSize, pixel_segments, spread, token_to_pixels
from sora_fast.diffusion.scheduled import scheduled
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents

Denoiser = Callable[[RaggedLatents, PackedLayout, Conditioning], RaggedLatents]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says about a state: clean data and noise [P], and the raw variance [P] if it learned one."""

    clean: Tensor
    noise: Tensor
    variance: Tensor | None


@dataclass(frozen=True, eq=False)
class Problem:
    """What a sampler's step may use: the path, the model at any state and level, and fresh noise."""

    path: NoisePath
    predict: Callable[[Tensor, Tensor], Prediction]
    spread: Callable[[Tensor], Tensor]
    fresh_noise: Callable[[], Tensor]

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The path's coefficients at the segments' levels [S], for every pixel."""
        a, b = self.path.coefficients(sigma)
        return self.spread(a), self.spread(b)


class Sampler(ABC):
    """One way of stepping down the noise levels."""

    paths: ClassVar[tuple[type[NoisePath], ...]] = (RectifiedFlow, DDPM)
    spacing: ClassVar[str] = "trailing"

    @abstractmethod
    def step(
        self, problem: Problem, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any, *, last: bool
    ) -> tuple[Tensor, Any]:
        """The state [P] at `sigma_next` [S] from that at `sigma` [S], and what the next step gets as `memory` (None at
        the first). last: sigma_next is 0."""


@dataclass(frozen=True)
class Euler(Sampler):
    """dx/dσ = velocity, first order: one call of the model a step."""

    paths = (RectifiedFlow,)

    def step(
        self, problem: Problem, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any, *, last: bool
    ) -> tuple[Tensor, Any]:
        at = problem.predict(x, sigma)
        return x + problem.spread(sigma_next - sigma) * (at.noise - at.clean), None


@dataclass(frozen=True)
class Heun(Sampler):
    """Second order by the trapezoid rule: two calls a step. The last step is Euler's, as in EDM (arXiv 2206.00364):
    models are not trained to see noise at σ = 0, where its second call would be."""

    paths = (RectifiedFlow,)

    def step(
        self, problem: Problem, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any, *, last: bool
    ) -> tuple[Tensor, Any]:
        at = problem.predict(x, sigma)
        slope = at.noise - at.clean
        change = problem.spread(sigma_next - sigma)
        if not last:
            ahead = problem.predict(x + change * slope, sigma_next)
            slope = (slope + ahead.noise - ahead.clean) / 2
        return x + change * slope, None


@dataclass(frozen=True)
class DDIM(Sampler):
    """The predicted clean data and noise, mixed for the next level (arXiv 2010.02502, η = 0; trailing steps)."""

    def step(
        self, problem: Problem, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any, *, last: bool
    ) -> tuple[Tensor, Any]:
        at = problem.predict(x, sigma)
        a, b = problem.coefficients(sigma_next)
        return a * at.clean + b * at.noise, None


@dataclass(frozen=True)
class DPMSolver2M(Sampler):
    """DPM-Solver++(2M) (arXiv 2211.01095): second order in λ = log(a/b) with one call a step.

    The first and the last step are first order: there is no history, and λ is infinite at σ = 0.
    """

    def step(
        self, problem: Problem, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any, *, last: bool
    ) -> tuple[Tensor, Any]:
        at = problem.predict(x, sigma)
        (a, b), (a_next, b_next) = problem.path.coefficients(sigma), problem.path.coefficients(sigma_next)
        log_snr, estimate = a.log() - b.log(), at.clean
        if memory is not None and not last:
            clean_before, log_snr_before = memory
            width = a_next.log() - b_next.log() - log_snr
            # λ is −∞ where a path begins without any data: that step's history has no weight.
            weight = width / (2 * (log_snr - log_snr_before))
            estimate = estimate + problem.spread(weight) * (estimate - clean_before)
        # a'(e^−h − 1) in a form that stays finite at both ends.
        kept = b_next / b
        moved = problem.spread(kept) * x + problem.spread(a_next - a * kept) * estimate
        return moved, (at.clean, log_snr)


@dataclass(frozen=True)
class Ancestral(Sampler):
    """DDPM's own stochastic step, respaced (arXiv 2102.09672). Learned variance if the path has it, else the
    posterior's."""

    paths = (DDPM,)
    spacing = "linspace"

    def step(
        self, problem: Problem, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any, *, last: bool
    ) -> tuple[Tensor, Any]:
        at = problem.predict(x, sigma)
        posterior = problem.path.posterior(sigma, sigma_next)
        mean = problem.spread(posterior.clean) * at.clean + problem.spread(posterior.x) * x
        if last:
            return mean, None
        log_variance = problem.spread(posterior.log_variance)
        if at.variance is not None:
            share = (at.variance + 1) / 2
            log_variance = share * problem.spread(posterior.log_beta) + (1 - share) * log_variance
        return mean + (0.5 * log_variance).exp() * problem.fresh_noise(), None


@torch.no_grad()
def sample(
    model: Denoiser,
    noise: RaggedLatents,
    layout: PackedLayout,
    path: NoisePath,
    sampler: Sampler,
    *,
    steps: int,
    patch_size: PatchSize,
    data: RaggedLatents | None = None,
    clean: Tensor | None = None,
    start: float = 1.0,
    generator: Generators = None,
    progress: Callable[[int, int], None] | None = None,
) -> RaggedLatents:
    """Run the model from noise to data; returns latents of the shapes and dtype of `noise`.

    model: called with (latents, layout, conditioning), text and labels bound; see also `guidance.Guided`. It is given
        the state as it is, float32 at least, and casts it as it likes (SoraDiT to its own dtype).
    noise: standard normal, of the shapes to make (`noise_like`). What the model says is widened: the state and all
        computation on it are float32 at least.
    data: what exists already, in the same shapes: the clean pixels, and where `start` < 1 everything to begin with.
    clean: [N] bool, tokens taken from `data`, that the model sees at noise level 0 and that come back bit-identical.
    start: the noise level to begin at; below 1 the beginning is `data` with noise (SDEdit).
    generator: for samplers that draw noise on the way; one, or one a video.
    progress: called with (steps done, steps) after each.
    """
    _check(noise, layout, path, sampler, data, clean, start)
    dtype = torch.promote_types(noise.flat.dtype, torch.float32)
    work = noise.with_flat(noise.flat.to(dtype))
    if clean is None:
        clean = torch.zeros(layout.capacity, dtype=torch.bool, device=layout.device)
    known = work.flat if data is None else data.flat.to(dtype)
    fixed = token_to_pixels(clean, layout, patch_size, noise)
    segments = pixel_segments(noise)

    def to_pixels(values: Tensor) -> Tensor:
        return spread(values.to(dtype), segments)

    def predict(x: Tensor, sigma: Tensor) -> Prediction:
        x = torch.where(fixed, known, x)
        output = model(work.with_flat(x), layout, Conditioning.with_clean(sigma, clean, layout, rows=rows))
        prediction, variance = split_output(output, work, path)
        denoised, noise_in_x = path.denoise(x, prediction.to(dtype), to_pixels(sigma))
        return Prediction(denoised, noise_in_x, None if variance is None else variance.to(dtype))

    model = scheduled(model, layout)
    problem = Problem(path, predict, to_pixels, lambda: noise_like(work, generator))
    sigmas = path.sigmas(steps, layout, start=start, spacing=sampler.spacing)
    rows = Conditioning.with_clean(sigmas[0], clean, layout).rows  # the same in every step
    x = work.flat if start == 1 else path.add_noise(known, work.flat, to_pixels(sigmas[0]))
    memory = None
    for done in range(steps):
        x, memory = sampler.step(problem, x, sigmas[done], sigmas[done + 1], memory, last=done == steps - 1)
        if progress is not None:
            progress(done + 1, steps)
    return noise.with_flat(torch.where(fixed, known, x).to(noise.flat.dtype))


def _check(
    noise: RaggedLatents,
    layout: PackedLayout,
    path: NoisePath,
    sampler: Sampler,
    data: RaggedLatents | None,
    clean: Tensor | None,
    start: float,
) -> None:
    if not isinstance(path, sampler.paths):
        names = " or ".join(cls.__name__ for cls in sampler.paths)
        raise TypeError(f"sampler: {type(sampler).__name__} needs a {names} path, not {type(path).__name__}")
    if noise.max_segments != layout.max_segments:
        raise ValueError(f"noise: {noise.max_segments} segments, but the layout has {layout.max_segments}")
    if data is None:
        if clean is not None or start != 1:
            raise ValueError("data: None; clean tokens and a start below 1 need the data that they come from")
    elif data.flat.shape != noise.flat.shape or data.flat.dtype != noise.flat.dtype:
        raise ValueError(
            f"data: {tuple(data.flat.shape)} {data.flat.dtype}; it must be as the noise, "
            f"{tuple(noise.flat.shape)} {noise.flat.dtype}"
        )
