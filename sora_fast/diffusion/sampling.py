"""From noise to data: what is prepared once for a pack, a step of it, and its end.

Clean pixels are put back before every call of the model and at the end, so they return bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_fast.diffusion.losses import split_output
from sora_fast.diffusion.noise import Generators, noise_like
from sora_fast.diffusion.paths import NoisePath
from sora_fast.diffusion.pixels import PatchSize, pixel_segments, token_to_pixels
from sora_fast.diffusion.samplers import Prediction, Sampler
from sora_fast.diffusion.scheduled import scheduled
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.packing._bundle import TensorBundle

Denoiser = Callable[[RaggedLatents, PackedLayout, Conditioning], RaggedLatents]
Evaluate = Callable[[Tensor, int], Prediction]
"""The model at a state [P]; at the step's own level (0), or at that which it leads to (1)."""


@dataclass(frozen=True, eq=False)
class Descent(TensorBundle):
    """All that the steps of a pack have in common, but for the model; a step is the model and then `Sampler.step`.

    segments: [P], the segment of every element; None: there is one. known, fixed: [P], the elements that are given, and
    where they are (bool); None: none is.
    """

    sampler: Sampler
    segments: Tensor | None
    known: Tensor | None = None
    fixed: Tensor | None = None

    @staticmethod
    def of(latents: RaggedLatents, sampler: Sampler, *, data: Tensor | None, fixed: Tensor | None) -> "Descent":
        """latents: the noise, as the state is. data: what exists, [P], of which `fixed` is given."""
        several = latents.max_segments > 1
        segments = pixel_segments(latents).clamp(max=latents.max_segments - 1) if several else None
        return Descent(sampler, segments, data if fixed is not None else None, fixed)

    def given(self, x: Tensor) -> Tensor:
        """The state with what is given in its place."""
        return x if self.fixed is None else torch.where(self.fixed, self.known, x)

    def step(
        self,
        x: Tensor,
        numbers: Tensor,
        evaluate: Evaluate,
        memory: Tensor | None,
        *,
        last: bool,
        fresh_noise: Callable[[], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """The state [P] after a step, and what the next step remembers of it.

        numbers: those of `Sampler.numbers` for this step, [n, S] in the state's dtype.
        """

        def predict(x: Tensor, *, ahead: int = 0) -> Prediction:
            return evaluate(self.given(x), ahead)

        if self.segments is not None:
            numbers = numbers[:, self.segments]
        return self.sampler.step(x, numbers, predict, memory, last=last, fresh_noise=fresh_noise)


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
    work = noise.with_flat(noise.flat.to(torch.promote_types(noise.flat.dtype, torch.float32)))
    known = work.flat if data is None else data.flat.to(work.flat.dtype)
    fixed = None if clean is None else token_to_pixels(clean, layout, patch_size, noise)
    sigmas = path.sigmas(steps, layout, start=start, spacing=sampler.spacing)
    descent = Descent.of(work, sampler, data=known, fixed=fixed)
    numbers = sampler.numbers(path, sigmas).to(work.flat.dtype)
    ends = sigmas[1:] if sampler.tells_end else None
    evaluate = _evaluate(scheduled(model, layout), work, layout, path, sigmas, clean, ends)

    x = work.flat if start == 1 else path.add_noise(known, work.flat, _spread(sigmas[0], descent).to(work.flat.dtype))
    memory = None
    for done in range(steps):
        x, memory = descent.step(
            x,
            numbers[done],
            lambda x, ahead, done=done: evaluate(x, done + ahead),
            memory,
            last=done == steps - 1,
            fresh_noise=lambda: noise_like(work, generator),
        )
        if progress is not None:
            progress(done + 1, steps)
    return noise.with_flat(descent.given(x).to(noise.flat.dtype))


def _evaluate(
    model: Denoiser,
    work: RaggedLatents,
    layout: PackedLayout,
    path: NoisePath,
    sigmas: Tensor,
    clean: Tensor | None,
    ends: Tensor | None,
) -> Callable[[Tensor, int], Prediction]:
    """Any model that is called with latents, layout and conditioning, at the level of so-and-so many steps."""
    if clean is None:
        clean = torch.zeros(layout.capacity, dtype=torch.bool, device=layout.device)
    rows = Conditioning.with_clean(sigmas[0], clean, layout).rows  # the same in every step

    def evaluate(x: Tensor, done: int) -> Prediction:
        end = None if ends is None else ends[done]
        conditioning = Conditioning.with_clean(sigmas[done], clean, layout, rows=rows, sigma_end=end)
        output = model(work.with_flat(x), layout, conditioning)
        return Prediction(*(None if part is None else part.to(x.dtype) for part in split_output(output, work, path)))

    return evaluate


def _spread(values: Tensor, descent: Descent) -> Tensor:
    return values if descent.segments is None else values[descent.segments]


def _check(
    noise: RaggedLatents,
    layout: PackedLayout,
    path: NoisePath,
    sampler: Sampler,
    data: RaggedLatents | None,
    clean: Tensor | None,
    start: float,
) -> None:
    check_pair(path, sampler)
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


def check_pair(path: NoisePath, sampler: Sampler) -> None:
    """TypeError for a sampler that cannot follow the path."""
    if not isinstance(path, sampler.paths):
        names = " or ".join(cls.__name__ for cls in sampler.paths)
        raise TypeError(f"sampler: {type(sampler).__name__} needs a {names} path, not {type(path).__name__}")
