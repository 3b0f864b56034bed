"""Flow maps: one call of the model leads from a noise level to any lower one, so that a few calls make a video.

The model is told two levels, t of the state and r ≤ t to lead to, and says D(x_t, t, r), such that

    x_r = (r/t)·x_t + (1 − r/t)·D(x_t, t, r)

lies on the trajectory of the teacher's flow through x_t (flow map matching, arXiv 2406.07507; D is x_t − t times the
average velocity of MeanFlow, arXiv 2505.13447). For r = t that is the teacher's own prediction of clean data, and for
r = 0 the trajectory's end. What D is to be is read off trajectories that the teacher's sampler has made, with guidance,
from noise: between any two of their states, x_t and x_r, it is D* = (x_r − (r/t)·x_t)/(1 − r/t). The map needs no
guidance, and so one call a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sora_fast.diffusion.paths import RectifiedFlow
from sora_fast.diffusion.pixels import PatchSize, pixel_segments, spread, token_to_pixels
from sora_fast.diffusion.samplers import DPMSolver2M, Euler, Prediction
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.packing._bundle import TensorBundle

Model = Callable[..., RaggedLatents]

# Of the demo's digits 91.2% came out right in 4 calls and 73.8% in 2; with 0.85 (at a rate 1.5 times as high) 90.3%
# and 68.8%.
OWN = 0.6


def leading(x: Tensor, there: Tensor, level: Tensor, end: Tensor) -> Tensor:
    """D* that leads from the state x at `level` to `there` at `end` < `level`; tensors of any shapes that broadcast."""
    kept = end / _positive(level)
    return (there - kept * x) / _positive(1 - kept)


def _positive(values: Tensor) -> Tensor:
    """Past the last video all levels are 0; what is computed there is not used, and must only be finite."""
    return values.clamp(min=torch.finfo(values.dtype).tiny)


@dataclass(frozen=True)
class FlowMap(Euler):
    """A jump a step: Euler's, along a straight line, for a model that is told where to (SoraDiT with `sigma_end`).

    spacing: of the levels, as the model was taught them; see `RectifiedFlow.sigmas`.
    """

    tells_end = True
    spacing: str = "trailing"


@dataclass(frozen=True, eq=False)
class Trajectory(TensorBundle):
    """What the teacher goes through from noise to data: states [N + 1, P] at levels [N + 1, S] float32."""

    states: Tensor
    levels: Tensor

    def lesson(self, pack: "FlowPack", first: Tensor, last: Tensor) -> "Lesson":
        """What is to be learned of its way from its states number `first` to `last`, [S] int64 each."""
        level, end = (self.levels.gather(0, number[None])[0] for number in (first, last))
        x, there = (self.states.gather(0, pack.spread(number)[None])[0] for number in (first, last))
        return Lesson(x, leading(x, there, pack.spread(level), pack.spread(end)), level, end)


@dataclass(frozen=True, eq=False)
class Lesson(TensorBundle):
    """x, target: a state and its D*, [P]; level, end: the levels that they lead from and to, [S]."""

    x: Tensor
    target: Tensor
    level: Tensor
    end: Tensor


def draw_ways(
    steps: int, calls: int, segments: int, *, device: torch.device, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Numbers of two states of a trajectory of `steps`, from first to last, [S] int64 each.

    OWN of the segments take one of the ways of a sampler of `calls` steps, of which `steps` is a multiple; the others
    any, so that other numbers of calls can be asked for.
    """
    kind, where, length = torch.rand(3, segments, generator=generator, dtype=torch.float32, device=device).unbind(0)
    stride = steps // calls
    own = (where * calls).long() * stride
    first = (where * steps).long()
    last = first + 1 + (length * (steps - first)).long()
    is_own = kind < OWN
    return torch.where(is_own, own, first), torch.where(is_own, own + stride, last)


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

    def ask(self, model: Model, x: Tensor, sigma: Tensor, end: Tensor | None, **inputs: Any) -> Tensor:
        """The path's target [P] as a model says it of the state x [P], at levels [S]; end: to levels [S], if it is told
        any; inputs: its text."""
        levels = Conditioning.with_clean(sigma, self.clean, self.layout, rows=self._rows, sigma_end=end)
        return model(self.data.with_flat(x), self.layout, levels, **inputs).flat.to(x.dtype)

    def predict(self, model: Model, x: Tensor, sigma: Tensor, end: Tensor | None, **inputs: Any) -> Tensor:
        """D [P], likewise."""
        return self.path.denoise(x, self.ask(model, x, sigma, end, **inputs), self.spread(sigma))[0]

    def trajectory(self, teacher: Callable[[Tensor, Tensor], Tensor], noise: Tensor, levels: Tensor) -> Trajectory:
        """From noise [P] through levels [N + 1, S] float64, which begin at 1 and end at 0.

        By DPM-Solver++(2M): of the demo's clips 8 late steps of it show as many right digits as 16 of Euler's (95.3% of
        320, 95.0% of 160), for half the calls. teacher: the path's target [P] at a state [P] and levels [S].
        """
        solver, steps = DPMSolver2M(), len(levels) - 1
        numbers, levels = solver.numbers(self.path, levels), levels.float()
        x, memory = self.at(noise, levels[0]), None
        states = [x]
        for done, level in enumerate(levels[:-1]):
            x, memory = solver.step(
                x,
                torch.stack([self.spread(number) for number in numbers[done]]),
                lambda x, level=level: Prediction(teacher(x, level)),
                memory,
                last=done == steps - 1,
                fresh_noise=lambda: noise,  # of which it takes none
            )
            x = self._kept(x)
            states.append(x)
        return Trajectory(torch.stack(states), levels)

    def spread(self, values: Tensor) -> Tensor:
        """A value a segment [S] for every pixel [P]; numbers that are not whole in the state's dtype."""
        if values.is_floating_point():
            values = values.to(self.data.flat.dtype)
        return spread(values, self.segments)

    def _kept(self, x: Tensor) -> Tensor:
        return torch.where(self.noisy, x, self.data.flat)


def flow_map_loss(pack: FlowPack, clean: Tensor, target: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """t⁻²‖D − D*‖², the squared error of the average velocity: the mean over the noisy pixels, and their number.

    clean, target: D and D* [P]. Below the path's least level the weight grows no more, as in its own loss.
    """
    weight = pack.spread(sigma).clamp(min=pack.path.least_sigma) ** -2
    pixels = pack.noisy.sum()
    error = torch.where(pack.noisy, clean - target.detach(), 0)
    return (error.square() * weight).sum() / pixels.clamp(min=1), pixels
