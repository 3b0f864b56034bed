"""Flow maps: one call of the model leads from a noise level to any lower one, so that a few calls make a video.

The model is told two levels, t of the state and r ≤ t to lead to, and says D(x_t, t, r), such that

    x_r = (r/t)·x_t + (1 − r/t)·D(x_t, t, r)

lies on the trajectory of the teacher's flow through x_t (flow map matching, arXiv 2406.07507; D is x_t − t times the
average velocity of MeanFlow, arXiv 2505.13447). For r = t that is the teacher's own prediction of clean data, and for
r = 0 the trajectory's end. The rest follows from splitting an interval (arXiv 2410.12557, 2507.16884): to go from t to
r is to go from t to s and then from s to r, which a slow average of the model itself does well for the shorter ways.
Guidance is part of the teacher's prediction alone: the map needs none, and so one call a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sora_fast.diffusion.paths import RectifiedFlow
from sora_fast.diffusion.pixels import PatchSize, pixel_segments, spread, token_to_pixels
from sora_fast.diffusion.samplers import Euler
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.packing._bundle import TensorBundle

Model = Callable[..., RaggedLatents]


def jump(x: Tensor, clean: Tensor, level: Tensor, end: Tensor) -> Tensor:
    """The state at `end` ≤ `level` from that at `level`, `clean` being D; tensors of any shapes that broadcast."""
    kept = end / _positive(level)
    return kept * x + (1 - kept) * clean


def split_share(level: Tensor, middle: Tensor, end: Tensor) -> Tensor:
    """What the first of two jumps, level → middle → end, has in the D of the one jump that does the same.

    D* = (x_end − (r/t)·x_t) / (1 − r/t) is λ·D₁ + (1 − λ)·D₂ with λ = r(t − s) / (s(t − r)): nothing cancels where the
    levels are near each other, and to the end of a trajectory, r = 0, D* is D₂.
    """
    return end * (level - middle) / _positive(middle * (level - end))


def _positive(values: Tensor) -> Tensor:
    """Past the last video all levels are 0; what is computed there is not used, and must only be finite."""
    return values.clamp(min=torch.finfo(values.dtype).tiny)


@dataclass(frozen=True)
class FlowMap(Euler):
    """A jump a step: Euler's, along a straight line, for a model that is told where to (SoraDiT with `sigma_end`)."""

    tells_end = True


# Of a jump's beginning, before the shift: no sampler of up to thirty steps begins one lower.
LEAST_LEVEL = 0.03


@dataclass(frozen=True, eq=False)
class Interval(TensorBundle):
    """The levels that a jump is trained at, a segment: t = `level` > s = `middle` > r = `end`, [S] float32 each."""

    level: Tensor
    middle: Tensor
    end: Tensor

    @staticmethod
    def draw(path: RectifiedFlow, layout: PackedLayout, generator: torch.Generator | None = None) -> "Interval":
        """Half of the segments jump to the end of their trajectory, r = 0, and half to anywhere.

        Uniform where a sampler's steps are even: before the path's shift by size.
        """
        size = layout.max_segments
        first, second, place, kind = torch.rand(
            4, size, generator=generator, dtype=torch.float32, device=layout.device
        ).unbind(0)
        to_the_end = kind < 0.5
        level = torch.where(to_the_end, first, torch.maximum(first, second)).clamp(min=LEAST_LEVEL)
        end = torch.where(to_the_end, 0, torch.minimum(first, second).clamp(max=level - LEAST_LEVEL / 2))
        middle = end + (level - end) * (0.25 + 0.5 * place)
        return Interval(*(path.shift(one, layout) for one in (level, middle, end)))

    @property
    def taught(self) -> Tensor:
        """[S], the levels where the teacher is to be followed, r = t: those that jumps begin at, the first ones of
        every other segment and the second ones of the others. Taught at the path's own levels, of which few are low,
        the jumps to r = 0 had nothing but themselves to follow there: after 1,289 steps of the demo no digit was left.
        """
        first = torch.arange(self.level.shape[0], device=self.level.device) % 2 == 0
        return torch.where(first, self.level, self.middle)


class FlowPack:
    """Videos on their way between data and noise, and what a flow map's targets and loss over them need.

    data: latents, the clean tokens' too; the computation on them is float32 at least, whatever a model's is.
    clean: [N] bool, tokens that stay as they are, at level 0.
    """

    def __init__(
        self, data: RaggedLatents, layout: PackedLayout, path: RectifiedFlow, *, clean: Tensor, patch_size: PatchSize
    ) -> None:
        self.data = data.with_flat(data.flat.to(torch.promote_types(data.flat.dtype, torch.float32)))
        self.layout, self.path, self.clean = layout, path, clean
        self.noisy = token_to_pixels(~clean, layout, patch_size, data)
        self.segments = pixel_segments(data)
        self._rows = Conditioning.with_clean(torch.zeros_like(layout.grids[:, 0]).float(), clean, layout).rows

    def at(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """The state [P] of noise [P] at levels [S]."""
        return self._kept(self.path.add_noise(self.data.flat, noise.to(self.data.flat.dtype), self.spread(sigma)))

    @property
    def given(self) -> Tensor:
        """[S] bool: segments with clean tokens."""
        segments = self.layout.max_segments
        owner = torch.where(self.clean & (self.layout.segment_ids >= 0), self.layout.segment_ids, segments).long()
        return self.clean.new_zeros(segments + 1).scatter(0, owner, True)[:segments]

    def predict(self, model: Model, x: Tensor, sigma: Tensor, end: Tensor | None, **inputs: Any) -> Tensor:
        """D [P] of a model at the state x [P], from levels [S] to levels [S], None: the same; inputs: its text."""
        levels = Conditioning.with_clean(sigma, self.clean, self.layout, rows=self._rows, sigma_end=end)
        output = model(self.data.with_flat(x), self.layout, levels, **inputs)
        return self.path.denoise(x, output.flat.to(x.dtype), self.spread(sigma))[0]

    def jump(self, x: Tensor, clean: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
        """`jump` of all but the clean tokens."""
        return self._kept(jump(x, clean, self.spread(sigma), self.spread(end)))

    def spread(self, values: Tensor) -> Tensor:
        """A value a segment [S] for every pixel [P]."""
        return spread(values.to(self.data.flat.dtype), self.segments)

    def _kept(self, x: Tensor) -> Tensor:
        return torch.where(self.noisy, x, self.data.flat)


def split_target(pack: FlowPack, model: Model, x: Tensor, at: Interval, **inputs: Any) -> Tensor:
    """D* [P] of the interval by two jumps of `model`, a slow average of the one that is trained."""
    first = pack.predict(model, x, at.level, at.middle, **inputs)
    between = pack.jump(x, first, at.level, at.middle)
    second = pack.predict(model, between, at.middle, at.end, **inputs)
    return torch.lerp(second, first, split_share(*map(pack.spread, (at.level, at.middle, at.end))))


def flow_map_loss(pack: FlowPack, clean: Tensor, target: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """t⁻²‖D − D*‖², the squared error of the average velocity: the mean over the noisy pixels, and their number.

    clean, target: D and D* [P]. Below the path's least level the weight grows no more, as in its own loss.
    """
    weight = pack.spread(sigma).clamp(min=pack.path.least_sigma) ** -2
    pixels = pack.noisy.sum()
    error = torch.where(pack.noisy, clean - target.detach(), 0)
    return (error.square() * weight).sum() / pixels.clamp(min=1), pixels
