"""A training step: the gradient of the mean over its packs, then one update. Nothing in it waits for the device.

The parts are plain functions and one module, `PackLoss`, that takes tensors of static shapes and gives tensors: what
is compiled (compiling.py) and recomputed (recompute.py) is decided outside.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sora_fast.diffusion.clean import clean_frames, random_clean_ends
from sora_fast.diffusion.losses import counted_loss
from sora_fast.diffusion.noise import noise_like
from sora_fast.diffusion.paths import NoisePath
from sora_fast.packing import PackedLayout, RaggedLatents
from sora_fast.packing._bundle import TensorBundle
from sora_fast.training.data.batches import Batch, Prompts
from sora_fast.training.distributed import World
from sora_fast.training.optim import WeightAverage, skip_where
from sora_fast.training.precision import computing
from sora_fast.training.run import Networks


@dataclass(frozen=True, eq=False)
class NoisyPack(TensorBundle):
    """All that the loss of a pack depends on, beside the weights: S segments, N tokens, P pixels.

    sigma: [S] noise levels. noise: [P]. clean: [N] bool, tokens given as they are.
    """

    latents: RaggedLatents
    layout: PackedLayout
    prompts: Prompts | None
    sigma: Tensor
    noise: Tensor
    clean: Tensor


def drawn(
    batch: Batch,
    path: NoisePath,
    generator: torch.Generator,
    entropy: Sequence[int],
    clean_share: float,
    *,
    no_prompts: Prompts | None = None,
) -> NoisyPack:
    """A batch with what is random about its step: a function of `entropy` alone, on the generator's device.

    no_prompts: stand for those of a batch that has none, see `Networks.no_prompts`.
    """
    reseed(generator, entropy)
    sigma = path.sample_sigma(batch.layout, generator)
    noise = noise_like(batch.latents, generator)
    ends = random_clean_ends(batch.layout, generator, share=clean_share)
    clean = clean_frames(batch.layout, *ends)
    prompts = no_prompts if batch.prompts is None else batch.prompts
    return NoisyPack(batch.latents, batch.layout, prompts, sigma, noise, clean)


def reseed(generator: torch.Generator, entropy: Sequence[int]) -> None:
    """Let what a generator draws from now on be a function of `entropy` alone."""
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    generator.manual_seed(int(seed >> 1))


class PackLoss(nn.Module):
    """NoisyPack → (the mean over the pixels that count, [] float32; their number, [] int64)."""

    def __init__(self, networks: Networks, precision: str) -> None:
        super().__init__()
        self.networks, self.precision = networks, precision

    def forward(self, pack: NoisyPack) -> tuple[Tensor, Tensor]:
        with computing(self.precision, pack.noise.device.type):
            return counted_loss(
                self.networks,
                pack.latents,
                pack.layout,
                self.networks.path,
                pack.sigma,
                noise=pack.noise,
                patch_size=self.networks.patch_size,
                clean=pack.clean,
                prompts=pack.prompts,
            )


def take_gradients(
    loss_of: Callable[[NoisyPack], tuple[Tensor, Tensor]],
    packs: Sequence[NoisyPack],
    parameters: Sequence[nn.Parameter],
    world: World | None = None,
) -> Tensor:
    """Leave in `.grad` the gradient of the mean over the pixels of all packs, of all workers; returns that mean, [].

    Not the mean of the packs' means: a pack with few noisy pixels counts little.
    """
    if len(packs) == 1:
        loss, pixels = loss_of(packs[0])
        loss.backward()
        mean = loss.detach()
    else:
        mean, pixels = _accumulated(loss_of, packs, parameters)
    (world or World()).mean([mean, *_gradients(parameters)], pixels)
    return mean


def _accumulated(
    loss_of: Callable[[NoisyPack], tuple[Tensor, Tensor]],
    packs: Sequence[NoisyPack],
    parameters: Sequence[nn.Parameter],
) -> tuple[Tensor, Tensor]:
    sums, counts = [], []
    for pack in packs:
        loss, pixels = loss_of(pack)
        total = loss * pixels
        total.backward()
        sums.append(total.detach())
        counts.append(pixels)
    pixels = torch.stack(counts).sum()
    divisor = pixels.clamp(min=1).to(sums[0].dtype)
    torch._foreach_div_(_gradients(parameters), divisor)
    return torch.stack(sums).sum() / divisor, pixels


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def update(
    parameters: Mapping[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    average: WeightAverage,
    loss: Tensor,
    *,
    clip_norm: float,
) -> tuple[Tensor, Tensor]:
    """Clip, step and average; if the loss or a gradient is not finite, change nothing. Gradients are gone afterwards.

    The device decides that: the host neither waits nor knows. Which step it is the optimizers and the average have been
    told before (`set_lr`, `set_step`). Returns the gradients' norm and whether the update was left out, [] each.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), clip_norm)
    bad = ~(loss + norm).isfinite()
    with skip_where(optimizers, bad):
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    average.update(bad)
    return norm, bad


@dataclass(frozen=True, eq=False)
class StepPacks(TensorBundle):
    """Those of one step."""

    packs: tuple[NoisyPack, ...]


@dataclass(frozen=True, eq=False)
class WholeStep:
    """StepPacks → (loss, norm, whether it was left out), [] each, and the weights are those of the next step: all that
    the device does in a step of one worker, as one function, such as a CUDA graph can hold."""

    loss_of: Callable[[NoisyPack], tuple[Tensor, Tensor]]
    parameters: Mapping[str, nn.Parameter]
    optimizers: Sequence[torch.optim.Optimizer]
    average: WeightAverage
    clip_norm: float

    def __call__(self, given: StepPacks) -> tuple[Tensor, Tensor, Tensor]:
        loss = take_gradients(self.loss_of, given.packs, list(self.parameters.values()))
        return loss, *update(self.parameters, self.optimizers, self.average, loss, clip_norm=self.clip_norm)
