from typing import Any

import pytest
import torch
from torch import Tensor

from sora_fast.diffusion import Euler, Guided, RectifiedFlow, noise_like, sample
from sora_fast.diffusion.scheduled import scheduled
from sora_fast.masks import SpacetimeMask
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.schedule import TileSchedule

SHAPES, PATCH = [(2, 2, 4, 6), (2, 1, 4, 4)], (1, 2, 2)


@pytest.fixture
def model() -> SoraDiT:
    torch.manual_seed(0)
    config = SoraDiTConfig(16, 1, 2, 2, patch_size=PATCH, num_classes=3, mask=SpacetimeMask.frame_causal())
    model = SoraDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # at the start the output is zero
    return model


@pytest.fixture
def latents() -> RaggedLatents:
    latents = RaggedLatents.from_list([torch.zeros(shape) for shape in SHAPES])
    return latents.with_flat(noise_like(latents, torch.Generator().manual_seed(0)))


@pytest.fixture
def layout() -> PackedLayout:
    return PackedLayout.from_grids([(2, 2, 3), (1, 2, 2)], order="tiled")


def test_a_scheduled_model_says_the_same(model: SoraDiT, latents: RaggedLatents, layout: PackedLayout) -> None:
    conditioning = Conditioning.per_segment(torch.tensor([0.3, 0.8]), layout)
    labels = torch.tensor([0, 2])
    said = model(latents, layout, conditioning, labels=labels)
    again = scheduled(model, layout)(latents, layout, conditioning, labels=labels)
    assert torch.equal(said.flat, again.flat) and said.flat.any()


def test_a_schedule_of_another_layout_is_refused(model: SoraDiT, latents: RaggedLatents, layout: PackedLayout) -> None:
    other = PackedLayout.from_grids([(2, 2, 2), (1, 2, 4)], order="tiled")
    conditioning = Conditioning.per_segment(torch.tensor([0.3, 0.8]), layout)
    with pytest.raises(ValueError, match="mask: a schedule"):
        scheduled(model, other)(latents, layout, conditioning, labels=torch.tensor([0, 2]))


def test_what_has_no_schedules_is_left_alone(layout: PackedLayout) -> None:
    def model(latents: RaggedLatents, layout: PackedLayout, conditioning: Conditioning) -> RaggedLatents:
        return latents

    assert scheduled(model, layout) is model


@pytest.mark.parametrize("guided", [False, True])
def test_a_sampler_builds_one_schedule(
    guided: bool, latents: RaggedLatents, layout: PackedLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SoraDiT(SoraDiTConfig(16, 1, 2, 2, patch_size=PATCH, num_classes=3 if guided else None))
    built, build = [], TileSchedule.build
    monkeypatch.setattr(TileSchedule, "build", lambda *args, **options: built.append(args) or build(*args, **options))
    denoiser = Guided(model, layout, scale=2.0, labels=_labels(1), null_labels=_labels(3)) if guided else model
    sample(denoiser, latents, layout, RectifiedFlow(base_tokens=8), Euler(), steps=5, patch_size=PATCH)
    assert len(built) == 1


def _labels(of: int) -> Tensor:
    return torch.full((len(SHAPES),), of)


class _OfItsOwn(SoraDiT):
    def forward(self, latents: RaggedLatents, layout: PackedLayout, conditioning: Conditioning) -> RaggedLatents:
        return latents


class _Wrapper:
    def __init__(self, model: SoraDiT) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, latents: RaggedLatents, layout: PackedLayout, conditioning: Conditioning) -> RaggedLatents:
        return latents


def test_a_model_that_takes_no_schedules_gets_none(
    model: SoraDiT, latents: RaggedLatents, layout: PackedLayout
) -> None:
    conditioning = Conditioning.per_segment(torch.tensor([0.3, 0.8]), layout)
    for other in (_OfItsOwn(model.config), _Wrapper(model)):
        assert scheduled(other, layout)(latents, layout, conditioning) is latents
