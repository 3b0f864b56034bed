"""improved-diffusion's sampling (Nichol & Dhariwal 2021), which DiT uses, from the papers' equations."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor


def space_timesteps(steps: int) -> list[int]:
    """The choice of timesteps for one section: the stride is added up in floating point."""
    place, taken = 0.0, []
    for _ in range(steps):
        taken.append(round(place))
        place += 999 / (steps - 1)
    return taken


def sample_chain(
    predict: Callable[[Tensor, int], Tensor], x: Tensor, noise: Iterator[Tensor], *, steps: int, learned_variance: bool
) -> Tensor:
    """From the noise x (C, …) down a respaced chain; no clipping.

    predict: x and the raw timestep → ε, and below it the share v of the variance (2C, …) if that is learned.
    noise: what every step but the last adds, in turn.
    """
    taken = space_timesteps(steps)
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[taken]
    # The respaced chain is a chain of its own, with betas that give the same ᾱ at the timesteps that it keeps.
    beta = 1 - kept / np.append(1, kept[:-1])
    alpha_bar = np.cumprod(1 - beta)
    before = np.append(1, alpha_bar[:-1])
    variance = beta * (1 - before) / (1 - alpha_bar)
    clipped = np.log(np.append(variance[1], variance[1:]))
    to_clean = beta * np.sqrt(before) / (1 - alpha_bar)
    to_x = (1 - before) * np.sqrt(1 - beta) / (1 - alpha_bar)

    for i in reversed(range(steps)):
        at = partial(_entry, i, x.dtype)
        output = predict(x, taken[i])
        epsilon, share = output[: len(x)], (output[len(x) :] + 1) / 2
        clean = at(np.sqrt(1 / alpha_bar)) * x - at(np.sqrt(1 / alpha_bar - 1)) * epsilon
        mean = at(to_clean) * clean + at(to_x) * x
        log_variance = at(clipped)
        if learned_variance:
            log_variance = share * at(np.log(beta)) + (1 - share) * log_variance
        x = mean + (0.5 * log_variance).exp() * next(noise) if i else mean
    return x


def _entry(index: int, dtype: torch.dtype, table: np.ndarray) -> Tensor:
    # The tables are made in fp64 and read in the dtype of the images.
    return torch.tensor(table[index], dtype=dtype)
