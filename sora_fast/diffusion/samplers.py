"""The step of each sampler, from one noise level per segment to the next lower one.

What a step needs to know of the levels is a few numbers a segment: `numbers` makes those of all steps at once, in
float64, so that the step itself is a call of the model and some sums of products.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sora_fast.diffusion.paths import DDPM, NoisePath, RectifiedFlow


class Prediction(NamedTuple):
    """What the model says about a state: the path's target [P], and the raw variance [P] if it learned one."""

    target: Tensor
    variance: Tensor | None = None


class Predict(Protocol):
    """The model at a state [P] that is at the step's own level; ahead=1: at the next one."""

    def __call__(self, x: Tensor, *, ahead: int = 0) -> Prediction: ...


class Sampler(ABC):
    """One way of stepping down the noise levels. It calls the model at the levels of the steps and at no others."""

    paths: ClassVar[tuple[type[NoisePath], ...]] = (RectifiedFlow, DDPM)
    spacing: ClassVar[str] = "trailing"
    looks_ahead: ClassVar[bool] = False
    """Whether a step also calls the model at the level that it leads to."""
    tells_end: ClassVar[bool] = False
    """Whether the model is told the level that a step leads to; see flow_map.py."""
    ends_otherwise: ClassVar[bool] = False
    """Whether the last step is another computation."""
    draws_noise: ClassVar[bool] = False
    """Whether steps but the last draw noise."""

    @abstractmethod
    def numbers(self, path: NoisePath, sigmas: Tensor) -> Tensor:
        """What every step needs to know: [K, n, S] float64, of the levels [K + 1, S] float64, which end with 0 for a
        segment that is done; what stands in its later steps is not used."""

    @abstractmethod
    def step(
        self,
        x: Tensor,
        numbers: Tensor,
        predict: Predict,
        memory: Tensor | None,
        *,
        last: bool,
        fresh_noise: Callable[[], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """The state [P] at the next level, and what the following step gets as `memory` [P] (None at the first).

        numbers: this step's, [n, P] or [n, 1]. last: it is the last one for every segment. fresh_noise: [P], normal.
        """


class _Linear(Sampler):
    """A step to a sum of the state and of one prediction there."""

    def step(
        self,
        x: Tensor,
        numbers: Tensor,
        predict: Predict,
        memory: Tensor | None,
        *,
        last: bool,
        fresh_noise: Callable[[], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        of_x, of_target = numbers
        return of_x * x + of_target * predict(x).target, None


@dataclass(frozen=True)
class Euler(_Linear):
    """dx/dσ = velocity, first order: one call of the model a step."""

    paths = (RectifiedFlow,)

    def numbers(self, path: NoisePath, sigmas: Tensor) -> Tensor:
        of_x, of_target = _velocity(path, sigmas[:-1])
        change = sigmas.diff(dim=0)
        return torch.stack([1 + change * of_x, change * of_target], dim=1)


@dataclass(frozen=True)
class Heun(Sampler):
    """Second order by the trapezoid rule: two calls a step. The last step is Euler's, as in EDM (arXiv 2206.00364):
    models are not trained to see noise at σ = 0, where its second call would be."""

    paths = (RectifiedFlow,)
    looks_ahead = True
    ends_otherwise = True

    def numbers(self, path: NoisePath, sigmas: Tensor) -> Tensor:
        change, second = sigmas.diff(dim=0), 0.5 * (sigmas[1:] > 0)
        here, there = _velocity(path, sigmas[:-1]), _velocity(path, sigmas[1:])
        # No weight, where the second call says nothing: its factors may be huge.
        there = [torch.where(second > 0, change * factor, 0) for factor in there]
        return torch.stack([*(change * factor for factor in here), *there, second], dim=1)

    def step(
        self,
        x: Tensor,
        numbers: Tensor,
        predict: Predict,
        memory: Tensor | None,
        *,
        last: bool,
        fresh_noise: Callable[[], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        of_x, of_target, of_x_ahead, of_target_ahead, second = numbers
        change = of_x * x + of_target * predict(x).target
        if not last:
            ahead = x + change
            change_ahead = of_x_ahead * ahead + of_target_ahead * predict(ahead, ahead=1).target
            change = change + second * (change_ahead - change)
        return x + change, None


@dataclass(frozen=True)
class DDIM(_Linear):
    """The predicted clean data and noise, mixed for the next level (arXiv 2010.02502, η = 0; trailing steps)."""

    def numbers(self, path: NoisePath, sigmas: Tensor) -> Tensor:
        clean_x, clean_target, noise_x, noise_target = path.denoising(sigmas[:-1])
        a, b = path.coefficients(sigmas[1:])
        return torch.stack([a * clean_x + b * noise_x, a * clean_target + b * noise_target], dim=1)


@dataclass(frozen=True)
class DPMSolver2M(Sampler):
    """DPM-Solver++(2M) (arXiv 2211.01095): second order in λ = log(a/b) with one call a step.

    The first and the last step are first order: there is no history, and λ is infinite at σ = 0.
    """

    def numbers(self, path: NoisePath, sigmas: Tensor) -> Tensor:
        a, b = path.coefficients(sigmas)
        of_x, of_target = path.denoising(sigmas[:-1])[:2]
        # a'(e^−h − 1) in a form that stays finite at both ends.
        kept = b[1:] / b[:-1]
        moved = a[1:] - a[:-1] * kept
        width = (a.log() - b.log()).diff(dim=0)
        # λ is −∞ where a path begins without any data: that step's history has no weight.
        weight = torch.zeros_like(width)
        weight[1:] = torch.where(sigmas[2:] > 0, width[1:] / (2 * width[:-1]), 0)
        return torch.stack([of_x, of_target, kept, moved, weight], dim=1)

    def step(
        self,
        x: Tensor,
        numbers: Tensor,
        predict: Predict,
        memory: Tensor | None,
        *,
        last: bool,
        fresh_noise: Callable[[], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        of_x, of_target, kept, moved, weight = numbers
        clean = of_x * x + of_target * predict(x).target
        estimate = clean if memory is None else clean + weight * (clean - memory)
        return kept * x + moved * estimate, clean


@dataclass(frozen=True)
class Ancestral(Sampler):
    """DDPM's own stochastic step, respaced (arXiv 2102.09672). Learned variance if the path has it, else the
    posterior's."""

    paths = (DDPM,)
    spacing = "linspace"
    ends_otherwise = True
    draws_noise = True

    def numbers(self, path: NoisePath, sigmas: Tensor) -> Tensor:
        posterior = path.posterior(sigmas[:-1], sigmas[1:])
        of_x, of_target = path.denoising(sigmas[:-1])[:2]
        mean = posterior.clean * of_x + posterior.x, posterior.clean * of_target
        noisy = (sigmas[1:] > 0).to(sigmas.dtype)  # the last step adds nothing
        return torch.stack([*mean, posterior.log_variance, posterior.log_beta, noisy], dim=1)

    def step(
        self,
        x: Tensor,
        numbers: Tensor,
        predict: Predict,
        memory: Tensor | None,
        *,
        last: bool,
        fresh_noise: Callable[[], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        of_x, of_target, log_variance, log_beta, noisy = numbers
        at = predict(x)
        mean = of_x * x + of_target * at.target
        if last:
            return mean, None
        if at.variance is not None:
            share = (at.variance + 1) / 2
            log_variance = share * log_beta + (1 - share) * log_variance
        return mean + noisy * (0.5 * log_variance).exp() * fresh_noise(), None


def _velocity(path: NoisePath, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(g, h) of dx/dσ = noise − clean = g·x + h·target."""
    clean_x, clean_target, noise_x, noise_target = path.denoising(sigma)
    return noise_x - clean_x, noise_target - clean_target
