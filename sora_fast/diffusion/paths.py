"""Noise paths: how data turns into noise as sigma goes from 0 to 1, and what a model is trained to say about it.

Sigma is the noise level outside this file, always: 0 clean data, 1 the noisiest state. What a path makes of it, its
coefficients and its discrete steps, is the path's own affair. (SoraDiT embeds 1000·σ, or with `discrete_time` the raw
timestep of DDPM, round(1000·σ) − 1.)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import accumulate, repeat

import torch
from torch import Tensor

from sora_fast.packing import PackedLayout

# What a few steps lose is lost in the last ones. Of 160 clips of the demo's that the teacher made in 4 (Euler, guided)
# 83.1% showed the right digit with even levels, 88.8% with 1, 0.7, 0.4 and 0.15; of 320 in 8 (DPM-Solver++) 93.1%,
# 95.3% and 93.1% with powers of 1, 1.3 and 1.6.
LATE = 1.3
SPACINGS = ("trailing", "late")


class NoisePath(ABC):
    """x = a(σ)·clean + b(σ)·noise, with (a, b) = (1, 0) at σ = 0. Tensors of any shapes that broadcast."""

    learned_variance: bool = False
    """True if models of this path predict 2C channels, the second half a variance."""

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b), with the shape and dtype of `sigma`."""

    @abstractmethod
    def sample_sigma(self, layout: PackedLayout, generator: torch.Generator | None = None) -> Tensor:
        """A noise level for each segment to train at: [S] float32 on the layout's device (and the generator's)."""

    @abstractmethod
    def sigmas(self, steps: int, layout: PackedLayout, *, start: float = 1.0, spacing: str = "trailing") -> Tensor:
        """The levels that a sampler goes through: [steps + 1, S] float64, falling from `start` to exactly 0."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the model should predict."""

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """What a squared error at `sigma` counts in the training loss."""
        return torch.ones_like(sigma)

    @abstractmethod
    def denoising(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What turns a prediction at x into clean data and noise, both linear in the two: (c, d, e, f), with the shape
        and dtype of `sigma`, of clean = c·x + d·prediction and noise = e·x + f·prediction."""

    def denoise(self, x: Tensor, prediction: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(clean, noise) that the prediction at `x` amounts to."""
        c, d, e, f = self.denoising(sigma)
        return c * x + d * prediction, e * x + f * prediction

    def add_noise(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The state at `sigma` between `clean` and `noise`."""
        a, b = self.coefficients(sigma)
        return a * clean + b * noise


@dataclass(frozen=True)
class RectifiedFlow(NoisePath):
    """x = (1 − σ)·clean + σ·noise; a sampler follows the velocity dx/dσ = noise − clean.

    prediction: "velocity", or "clean" data, from which the velocity follows as (x − clean) / σ. Data of few degrees of
        freedom in large patches are far easier to predict than noise, which has as many as there are pixels. The loss
        is that of the velocity all the same, so an error counts 1/σ² (JiT, arXiv 2511.13720).
    least_sigma: below it the weight 1/σ² grows no more.
    mean, std: of the normal variable whose sigmoid is the training σ (0 and 1: best of the sweep in "Scaling
    Rectified Flow Transformers", arXiv 2403.03206).
    base_tokens: larger segments need more noise for the same uncertainty, so σ becomes sσ / (1 + (s − 1)σ), in
    training and in sampling, with s = √(tokens of the full grid / base_tokens) (same source, 5.3.2). None: no shift.
    """

    mean: float = 0.0
    std: float = 1.0
    base_tokens: int | None = None
    prediction: str = "velocity"
    least_sigma: float = 0.1

    def __post_init__(self) -> None:
        if self.prediction not in ("velocity", "clean"):
            raise ValueError(f'prediction: {self.prediction!r}; it must be "velocity" or "clean"')
        if not 0 < self.least_sigma < 1:
            raise ValueError(f"least_sigma: {self.least_sigma}; it must lie between 0 and 1")
        if self.std <= 0:
            raise ValueError(f"std: {self.std}; it must be positive")
        if self.base_tokens is not None and self.base_tokens < 1:
            raise ValueError(f"base_tokens: {self.base_tokens}; it must be at least 1, or None")

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - sigma, sigma

    def shift(self, sigma: Tensor, layout: PackedLayout) -> Tensor:
        """Move the levels [..., S] according to the segments' sizes; 0 and 1 stay exactly."""
        if self.base_tokens is None:
            return sigma
        # An empty segment counts as one token: its level is never used but must not be NaN.
        s = (layout.grids.prod(1).clamp(min=1).to(sigma.dtype) / self.base_tokens).sqrt()
        return s * sigma / ((1 - sigma) + s * sigma)

    def sample_sigma(self, layout: PackedLayout, generator: torch.Generator | None = None) -> Tensor:
        normal = torch.randn(layout.max_segments, generator=generator, dtype=torch.float32, device=layout.device)
        return self.shift(torch.sigmoid(self.mean + self.std * normal), layout)

    def sigmas(self, steps: int, layout: PackedLayout, *, start: float = 1.0, spacing: str = "trailing") -> Tensor:
        """spacing: "trailing", even before the shift by size, or "late", nearer to the data: even to the power LATE."""
        _check_schedule(steps, start, spacing, known=SPACINGS)
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=layout.device)
        even = even**LATE if spacing == "late" else even
        shifted = self.shift(even[:, None].expand(-1, layout.max_segments), layout)
        return start * shifted

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return clean if self.prediction == "clean" else noise - clean

    def loss_weight(self, sigma: Tensor) -> Tensor:
        if self.prediction == "velocity":
            return torch.ones_like(sigma)
        return sigma.clamp(min=self.least_sigma) ** -2

    def denoising(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(sigma)
        if self.prediction == "clean":
            # At σ = 0 the noise cannot be told from x, and nothing asks for it: only that it is finite.
            least = sigma.clamp(min=torch.finfo(sigma.dtype).eps)
            return 0 * one, one, 1 / least, (sigma - 1) / least
        return one, -sigma, one, 1 - sigma


@dataclass(frozen=True)
class DDPM(NoisePath):
    """x = √ᾱ·clean + √(1 − ᾱ)·noise in discrete steps with a linear β; σ = (t + 1) / steps for the raw timestep t.

    So t = 0 … steps − 1 as in DiT and its ancestors, and σ = 0 is "before the first step": ᾱ = 1. A σ between
    two steps counts as the nearest.

    prediction: "epsilon" (the noise) or "velocity" (a·noise − b·clean, arXiv 2202.00512).
    learned_variance: the model predicts 2C channels; the second half says where the log variance of a step lies
        between its bounds (arXiv 2102.09672, DiT).
    zero_terminal_snr: ᾱ rescaled so that σ = 1 is pure noise (arXiv 2305.08891). The noise says nothing about the data
        there, so this needs prediction="velocity".
    """

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction: str = "epsilon"
    learned_variance: bool = False
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "velocity"):
            raise ValueError(f'prediction: {self.prediction!r}; it must be "epsilon" or "velocity"')
        if self.steps < 2 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"steps, beta_start, beta_end: {self.steps}, {self.beta_start}, {self.beta_end}; there must be at "
                "least 2 steps and 0 < beta_start ≤ beta_end < 1"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError('zero_terminal_snr: True; it needs prediction="velocity", since noise tells nothing there')

    def step(self, sigma: Tensor) -> Tensor:
        """How many noising steps lead to `sigma`: int64, 0 for clean data; the raw timestep plus one."""
        return (sigma * self.steps).round().long()

    def alpha_bar(self, device: torch.device) -> Tensor:
        """ᾱ after 0 … steps noising steps: [steps + 1] float64. Computed where it is needed: it costs less than a
        copy to the device, which would make a compiled or captured step wait for the host."""
        beta = torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64, device=device)
        table = torch.cumprod(1 - beta, dim=0)
        if self.zero_terminal_snr:
            root = table.sqrt()
            table = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
        return torch.cat([table.new_ones(1), table])

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        table, step = self.alpha_bar(sigma.device), self.step(sigma)
        return table.sqrt().to(sigma.dtype)[step], (1 - table).sqrt().to(sigma.dtype)[step]

    def sample_sigma(self, layout: PackedLayout, generator: torch.Generator | None = None) -> Tensor:
        shape = (layout.max_segments,)
        steps = torch.randint(1, self.steps + 1, shape, generator=generator, device=layout.device)
        return steps.float() / self.steps

    def sigmas(self, steps: int, layout: PackedLayout, *, start: float = 1.0, spacing: str = "trailing") -> Tensor:
        """`steps` of the path's own steps, then 0. spacing: "trailing", steps·(1 − i/n), or "linspace", from the last
        step to the first with both included, as improved-diffusion respaces a chain."""
        _check_schedule(steps, start, spacing, known=("trailing", "linspace"))
        last = round(start * self.steps)
        if steps > last:
            raise ValueError(f"steps: {steps}; from start={start} this path has {last} steps")
        if spacing == "trailing":
            taken = torch.linspace(last, last / steps, steps, dtype=torch.float64, device=layout.device).round()
        else:
            taken = torch.tensor(_respaced(last, steps), dtype=torch.float64, device=layout.device) + 1
        levels = torch.cat([taken, taken.new_zeros(1)]) / self.steps
        return levels[:, None].expand(-1, layout.max_segments)

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        a, b = self.coefficients(sigma)
        return a * noise - b * clean

    def denoising(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, b = self.coefficients(sigma)
        if self.prediction == "epsilon":
            return 1 / a, -b / a, torch.zeros_like(a), torch.ones_like(a)
        return a, -b, b, a

    def posterior(self, sigma: Tensor, sigma_next: Tensor) -> "Posterior":
        """q(x at sigma_next | x at sigma, clean) for 0 ≤ sigma_next < sigma; every field has the shape of sigma."""
        table = self.alpha_bar(sigma.device)
        now, then = table[self.step(sigma)], table[self.step(sigma_next)]
        beta = 1 - now / then
        variance = beta * (1 - then) / (1 - now)
        return Posterior(
            clean=then.sqrt() * beta / (1 - now),
            x=(now / then).sqrt() * (1 - then) / (1 - now),
            log_variance=variance.clamp(min=_LEAST_VARIANCE).log(),
            log_beta=beta.clamp(min=_LEAST_VARIANCE).log(),
        )


# The variance of the very last step is 0; its logarithm must stay finite. The step itself adds no noise.
_LEAST_VARIANCE = 1e-20


@dataclass(frozen=True, eq=False)
class Posterior:
    """mean = clean·(clean data) + x·(current state); the log variances are the least and the largest sensible one."""

    clean: Tensor
    x: Tensor
    log_variance: Tensor
    log_beta: Tensor


def _respaced(last: int, steps: int) -> list[int]:
    """The timesteps last − 1 … 0 of a chain of `steps`, falling; a chain of one step takes the noisiest."""
    if steps == 1:
        return [last - 1]
    # Strides are added up, not multiplied, so that halves fall where they do in improved-diffusion.
    strides = repeat((last - 1) / (steps - 1), steps - 1)
    return [round(place) for place in accumulate(strides, initial=0.0)][::-1]


def _check_schedule(steps: int, start: float, spacing: str, *, known: tuple[str, ...]) -> None:
    if steps < 1:
        raise ValueError(f"steps: {steps}; it must be at least 1")
    if not 0 < start <= 1:
        raise ValueError(f"start: {start}; it must lie in (0, 1], 1 being pure noise")
    if spacing not in known:
        raise ValueError(f"spacing: {spacing!r}; it must be one of {', '.join(known)}")
