import math
from dataclasses import dataclass

import pytest
import torch

from sora_fast.diffusion import Euler, RectifiedFlow, noise_like, sample
from sora_fast.diffusion.flow_map import OWN, FlowMap, FlowPack, draw_ways, flow_map_loss, leading
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


LEVELS = torch.tensor([1.0, 0.9, 0.5])


def test_what_leads_there_does() -> None:
    generator = torch.Generator().manual_seed(0)
    r, t = torch.rand(2, 99, generator=generator, dtype=torch.float64).sort(dim=0).values
    r[:9] = 0
    x, clean = torch.randn(2, 99, generator=generator, dtype=torch.float64)
    there = r / t * x + (1 - r / t) * clean
    torch.testing.assert_close(leading(x, there, t, r), clean, rtol=1e-9, atol=1e-9)
    nowhere = torch.zeros(1, dtype=torch.float64)
    assert leading(x, x, nowhere, nowhere).isfinite().all()


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
def test_a_trajectory_teaches_the_exact_map(path) -> None:
    """The finer the teacher's steps the nearer, by more than in proportion; and a map that is wrong has a loss."""
    noisy, noise = pack(path, share=0.3)

    def taught(steps: int) -> float:
        def teacher(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return noisy.ask(GaussianModel(path), x, sigma, None)

        made = noisy.trajectory(teacher, noise, path.sigmas(steps, noisy.layout))
        assert made.states.shape == (steps + 1, len(noise)) and made.levels.shape == (steps + 1, len(SHAPES) + 1)
        kept = ~noisy.noisy
        assert torch.equal(made.states[:, kept], noisy.data.flat[kept].expand(steps + 1, -1))
        first, last = torch.tensor([[0, 1, 0], [4, 3, 4]]) * steps // 4
        lesson = made.lesson(noisy, first, last)
        exact = noisy.predict(ExactMap(path), lesson.x, lesson.level, lesson.end)
        wrong = noisy.predict(ExactMap(path, off=0.1), lesson.x, lesson.level, lesson.end)
        losses = [flow_map_loss(noisy, clean, lesson.target, lesson.level)[0] for clean in (exact, wrong)]
        assert losses[1] > losses[0] + 1e-4
        return (exact - lesson.target)[noisy.noisy].abs().max().item()

    coarse, fine = taught(64), taught(256)
    assert fine < 1e-3 and fine < coarse / 6


def test_on_the_diagonal_the_map_is_the_model() -> None:
    noisy, noise = pack(PATHS[0])
    levels = LEVELS
    x = noisy.at(noise, levels)
    # Of a jump of no length the limit: ExactMap itself divides by it.
    near = noisy.predict(ExactMap(PATHS[0]), x, levels, levels - 1e-5)
    assert (near - noisy.predict(GaussianModel(PATHS[0]), x, levels, None))[noisy.noisy].abs().max() < 1e-4


def test_clean_tokens_stay_and_do_not_count() -> None:
    noisy, noise = pack(PATHS[1], share=0.5)
    x = noisy.at(noise, LEVELS)
    kept = ~noisy.noisy
    assert kept.any() and torch.equal(x[kept], noisy.data.flat[kept])
    prediction = torch.where(noisy.noisy, torch.randn_like(x), torch.nan).requires_grad_()
    loss, pixels = flow_map_loss(noisy, prediction, torch.where(noisy.noisy, 0.0, torch.nan), LEVELS)
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


def test_ways() -> None:
    first, last = draw_ways(8, 4, 4000, device=torch.device("cpu"), generator=torch.Generator().manual_seed(0))
    assert ((first >= 0) & (first < last) & (last <= 8)).all()
    assert set(zip(first.tolist(), last.tolist(), strict=True)) == {(i, j) for i in range(8) for j in range(i + 1, 9)}
    own = ((first % 2 == 0) & (last == first + 2)).float().mean().item()
    by_chance = sum(1 / 8 / (8 - i) for i in range(0, 8, 2))
    assert own == pytest.approx(OWN + (1 - OWN) * by_chance, abs=0.03)
