import math
from dataclasses import dataclass

import pytest
import torch

from sora_fast.diffusion import Euler, RectifiedFlow, noise_like, sample
from sora_fast.diffusion.flow_map import FlowMap, FlowPack, Interval, flow_map_loss, jump, split_share, split_target
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from tests.diffusion.stand_ins import PATCH, GaussianModel, layout_of, pixel_sigma

SHAPES = [(2, 3, 5, 4), (2, 1, 3, 3)]
PATHS = [RectifiedFlow(base_tokens=8), RectifiedFlow(base_tokens=8, prediction="clean")]


@dataclass
class ExactMap(GaussianModel):
    """The flow map of normal data. off: added to where it leads to, so that it is wrong."""

    off: float = 0.0

    def __call__(self, latents: RaggedLatents, layout: PackedLayout, conditioning: Conditioning) -> RaggedLatents:
        if conditioning.sigma_end is None:
            return super().__call__(latents, layout, conditioning)
        t = pixel_sigma(latents, layout, conditioning).clamp(min=1e-9)
        ends = Conditioning(conditioning.sigma_end, conditioning.segment, conditioning.rows)
        r = pixel_sigma(latents, layout, ends)
        x = latents.flat.double()
        there = (1 - r) * self.mean + self.total(r) / self.total(t) * (x - (1 - t) * self.mean) + self.off
        clean = (there - r / t * x) / (1 - r / t)
        return latents.with_flat(self.path.target(clean, (x - (1 - t) * clean) / t, t))


def pack(path: RectifiedFlow, share: float = 0.0) -> tuple[FlowPack, torch.Tensor]:
    """Two videos of normal data, with a share of clean tokens, and noise."""
    latents = RaggedLatents.empty(
        SHAPES, capacity=sum(map(math.prod, SHAPES)) + 7, max_segments=len(SHAPES) + 1, dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(0)
    data = latents.with_flat(0.7 + 0.3 * noise_like(latents, generator))
    layout = layout_of(data.to_list(), order="tiled", max_segments=len(SHAPES) + 1, tile_size=16)
    clean = torch.rand(layout.capacity, generator=generator) < share
    return FlowPack(data, layout, path, clean=clean, patch_size=PATCH), noise_like(latents, generator)


def interval() -> Interval:
    levels = torch.tensor([[1.0, 0.9, 0.5], [0.8, 0.3, 0.4], [0.6, 0.0, 0.2]])
    return Interval(*levels)


def test_two_jumps_are_one() -> None:
    generator = torch.Generator().manual_seed(0)
    r, s, t = torch.rand(3, 99, generator=generator, dtype=torch.float64).sort(dim=0).values
    r[:9] = 0
    s[9:20] = t[9:20] * (1 - 1e-9)
    x, first, second = torch.randn(3, 99, generator=generator, dtype=torch.float64)
    share = split_share(t, s, r)
    assert ((share >= 0) & (share <= 1)).all() and not share[:9].any()
    there = jump(jump(x, first, t, s), second, s, r)
    torch.testing.assert_close(jump(x, share * first + (1 - share) * second, t, r), there, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=["velocity", "clean"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_exact_map_is_at_the_end_in_any_number_of_calls(path, steps) -> None:
    latents = pack(path)[0].data
    noise = latents.with_flat(noise_like(latents, torch.Generator().manual_seed(1)))
    layout = layout_of(noise.to_list(), max_segments=len(SHAPES) + 1)
    exact = GaussianModel(path).flow_to_data(noise.flat, torch.ones(1, dtype=torch.float64))

    def error(sampler) -> float:
        made = sample(ExactMap(path), noise, layout, path, sampler, steps=steps, patch_size=PATCH)
        return max(
            (a - b).abs().max().item() for a, b in zip(made.to_list(), noise.with_flat(exact).to_list(), strict=True)
        )

    assert error(FlowMap()) < 1e-6  # levels are told in float32
    assert error(Euler()) > 1e-2


@pytest.mark.parametrize("path", PATHS, ids=["velocity", "clean"])
def test_the_exact_map_is_its_own_target(path) -> None:
    """And one that is not has a loss."""
    noisy, noise = pack(path, share=0.3)
    at = interval()
    x = noisy.at(noise, at.level)
    target = split_target(noisy, ExactMap(path), x, at)
    exact = noisy.predict(ExactMap(path), x, at.level, at.end)
    assert (exact - target)[noisy.noisy].abs().max() < 1e-5
    assert flow_map_loss(noisy, exact, target, at.level)[0] < 1e-10
    assert flow_map_loss(noisy, noisy.predict(ExactMap(path, off=0.1), x, at.level, at.end), target, at.level)[0] > 1e-4


def test_on_the_diagonal_the_map_is_the_model() -> None:
    noisy, noise = pack(PATHS[0])
    levels = interval().level
    x = noisy.at(noise, levels)
    # Of a jump of no length the limit: ExactMap itself divides by it.
    near = noisy.predict(ExactMap(PATHS[0]), x, levels, levels - 1e-5)
    assert (near - noisy.predict(GaussianModel(PATHS[0]), x, levels, None))[noisy.noisy].abs().max() < 1e-4


def test_clean_tokens_stay_and_do_not_count() -> None:
    noisy, noise = pack(PATHS[1], share=0.5)
    at = interval()
    x = noisy.at(noise, at.level)
    kept = ~noisy.noisy
    assert kept.any() and torch.equal(x[kept], noisy.data.flat[kept])
    moved = noisy.jump(x, torch.randn_like(x), at.level, at.middle)
    assert torch.equal(moved[kept], noisy.data.flat[kept]) and not torch.equal(moved, x)
    prediction = torch.where(noisy.noisy, torch.randn_like(x), torch.nan).requires_grad_()
    loss, pixels = flow_map_loss(noisy, prediction, torch.where(noisy.noisy, 0.0, torch.nan), at.level)
    loss.backward()
    assert loss.isfinite() and pixels == noisy.noisy.sum()
    assert not prediction.grad[kept].any() and prediction.grad[noisy.noisy].all()


def test_the_loss_is_the_velocity_s() -> None:
    noisy, _ = pack(PATHS[1])
    t = torch.tensor([0.5, 0.25, 1.0])
    clean, target = torch.randn(2, noisy.data.flat.shape[0], dtype=torch.float64)
    error = ((clean - target) / noisy.spread(t))[noisy.noisy]
    torch.testing.assert_close(flow_map_loss(noisy, clean, target, t)[0], error.square().mean())


def test_given_segments() -> None:
    layout = PackedLayout.from_grids([(2, 2, 2), (1, 1, 1), (1, 2, 2)], capacity=20, max_segments=5)
    data = RaggedLatents.from_list([torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 4)])
    clean = torch.zeros(20, dtype=torch.bool)
    clean[[9, 17]] = True  # the third segment, and padding
    data = RaggedLatents.from_list(data.to_list(), max_segments=5)
    noisy = FlowPack(data, layout, PATHS[0], clean=clean, patch_size=PATCH)
    assert noisy.given.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("path", [*PATHS, RectifiedFlow()])
def test_intervals(path) -> None:
    layout = PackedLayout.from_grids([(1, 1, 1 + size % 9) for size in range(4000)])
    at = Interval.draw(path, layout, torch.Generator().manual_seed(0))
    assert ((at.end < at.middle) & (at.middle < at.level) & (at.level <= 1)).all()
    assert (at.end == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (at.level > 0.95).float().mean() > 0.05, "a sampler begins there"
