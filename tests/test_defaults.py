"""The process's default dtype and device are for what modules are born with; nothing else follows them."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sora_fast.diffusion import DDPM, Ancestral, DPMSolver2M, Guided, Heun, RectifiedFlow, noise_like, sample
from sora_fast.diffusion.clean import clean_frames, random_clean_ends
from sora_fast.diffusion.losses import training_loss
from sora_fast.generation.engine import Engine
from sora_fast.generation.tasks import image_to_video, text_to_video
from sora_fast.integrations import dit, layout_from_cu_seqlens, padded_attention
from sora_fast.integrations.flash_attn import flash_attn_varlen_func
from sora_fast.masks import SpacetimeMask
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.models.sora_dit import POSITIONS
from sora_fast.ops import packed_attention, qk_norm_rope, segment_mean
from sora_fast.ops.qk_norm_rope import Rope3D
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.packing._bundle import TensorBundle
from sora_fast.schedule import TileSchedule
from sora_fast.training.data.sources import Sample
from sora_fast.training.run import Networks
from sora_fast.training.trainer import Trainer
from tests.training.test_trainer import Gradients, tiny

DEFAULTS = [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")]
PATCH = (1, 2, 2)
GRIDS = [(2, 2, 3), (1, 3, 2), (3, 1, 1)]


@contextlib.contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def model_with(position: str = "rope", **options: Any) -> SoraDiT:
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 1, "heads": 2, "in_channels": 2, "patch_size": PATCH}
    model = SoraDiT(SoraDiTConfig(**sizes, position=position, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def everything(model: SoraDiT) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


# What is made and run under other defaults, from models and numbers that are there before.


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def structures() -> Any:
    layout = PackedLayout.from_grids(GRIDS, order="tiled", capacity=30, max_segments=4, tile_size=16)
    empty = RaggedLatents.from_list([], max_segments=2)
    schedules = [
        TileSchedule.build(layout, mask)
        for mask in (SpacetimeMask.full(), SpacetimeMask.window(1, 1, 1), SpacetimeMask.frame_causal())
    ]
    frames = Conditioning.per_frame(numbers(4, 3), layout)
    clean = clean_frames(layout, *random_clean_ends(layout, seeded()))
    return layout, empty, schedules, frames, clean, schedules[1].to_block_mask().kv_indices


def levels() -> Any:
    layout = PackedLayout.from_grids(GRIDS)
    flow, ddpm = RectifiedFlow(base_tokens=4), DDPM()
    return [(path.sample_sigma(layout, seeded()), path.sigmas(4, layout)) for path in (flow, ddpm)]


def operations() -> Any:
    layout = PackedLayout.from_grids(GRIDS, capacity=23)
    q, k, v = numbers(3, 23, 2, 16).unbind()
    offsets = layout.cu_seqlens
    ropes = (Rope3D(), Rope3D(scaling="ntk", extent=(4, 4, 4), scale=(1.0, 2.0, 2.0)))
    return (
        [qk_norm_rope(q, k, None, None, layout, rope, segment_scale=numbers(3, 3).abs()) for rope in ropes],
        [qk_norm_rope(q, k, None, None, layout, rope) for rope in ropes],
        [packed_attention(q, k, v, layout, mask) for mask in (None, SpacetimeMask.spatial())],
        segment_mean(q[:, 0], layout),
        flash_attn_varlen_func(q, k, v, offsets, offsets, 12, 12, window_size=(2, 0)),
        layout_from_cu_seqlens(offsets, capacity=23),
        padded_attention(*numbers(3, 2, 4, 2, 8), numbers(2, 4) > 0),
    )


def model_and_loss(model: SoraDiT) -> Any:
    layout = PackedLayout.from_grids(GRIDS)
    latents = RaggedLatents.from_list([numbers(2, t, 2 * h, 2 * w) for t, h, w in GRIDS])
    sigma = RectifiedFlow().sample_sigma(layout, seeded())
    output = model(latents, layout, Conditioning.per_segment(sigma, layout))
    noise = noise_like(latents, seeded())
    loss = training_loss(model, latents, layout, RectifiedFlow(), sigma, noise=noise, patch_size=PATCH)
    return output, loss, torch.autograd.grad(loss, list(model.parameters()))


def sampling(model: SoraDiT) -> Any:
    layout = PackedLayout.from_grids(GRIDS)
    noise = RaggedLatents.from_list([numbers(2, t, 2 * h, 2 * w) for t, h, w in GRIDS])
    given = {"steps": 3, "patch_size": PATCH, "generator": seeded()}
    return [
        sample(model, noise, layout, path, sampler, **given)
        for path, sampler in ((RectifiedFlow(), Heun()), (RectifiedFlow(), DPMSolver2M()), (DDPM(), Ancestral()))
    ]


def guided(model: SoraDiT) -> Any:
    layout = PackedLayout.from_grids(GRIDS)
    noise = RaggedLatents.from_list([numbers(2, t, 2 * h, 2 * w) for t, h, w in GRIDS])
    labels = torch.tensor([0, 1, 2], device="cpu")
    guidance = Guided(model, layout, scale=4.3, labels=labels, null_labels=labels * 0 + 3, channels=1)
    return sample(guidance, noise, layout, RectifiedFlow(), Heun(), steps=2, patch_size=PATCH)


def published(model: SoraDiT) -> Any:
    images = [numbers(4, 1, 4, 6)]
    labels = torch.tensor([1], device="cpu")
    return dit.sample(model, images, labels, steps=2, guidance=4.3, generator=seeded())


def generation(networks: Networks) -> Any:
    engine = Engine(networks)
    image = numbers(1, 1, 8, 8)
    requests = [text_to_video("left", 2, (8, 12), guidance=4.3), image_to_video(image, "", 3, seed=1)]
    return engine.generate(requests, steps=2)


def numbers(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))


WORK: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "structures": (structures, tuple),
    "levels": (levels, tuple),
    "operations": (operations, tuple),
    **{name: (model_and_loss, lambda name=name: (model_with(name),)) for name in POSITIONS},
    "sampling": (sampling, lambda: (model_with(),)),
    "guided": (guided, lambda: (model_with(num_classes=3),)),
    "published": (published, lambda: (SoraDiT(dit.config("S", 2, num_classes=3)),)),
    "generation": (generation, lambda: (Networks(tiny()),)),
}


def tensors(made: Any) -> list[Tensor]:
    """All of them, those in dataclasses too."""
    if isinstance(made, TensorBundle):
        made = list(vars(made).values())
    if isinstance(made, list | tuple | dict):
        parts = pytree.tree_leaves(made, is_leaf=lambda part: part is not made)
        return [tensor for part in parts for tensor in tensors(part)]
    return [made.detach()] if isinstance(made, Tensor) else []


@pytest.mark.parametrize(("dtype", "device"), DEFAULTS)
@pytest.mark.parametrize("work", WORK)
def test_the_same_bits_under_any_defaults(work: str, dtype: torch.dtype, device: str) -> None:
    run, given = WORK[work]
    arguments = given()
    with defaults(dtype, device):
        actual = tensors(run(*arguments))
    # Afterwards, so that what was kept in between would be seen here too.
    expected = tensors(run(*arguments))
    assert len(actual) == len(expected) > 0
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine.dtype, mine.device) == (theirs.dtype, theirs.device)
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_model_is_born_in_the_default_dtype(position: str, dtype: torch.dtype) -> None:
    with defaults(dtype, "cpu"):
        model = model_with(position)
        assert {x.dtype for x in everything(model)} == {dtype}
        output, loss, gradients = model_and_loss(model)
    assert output.flat.dtype == dtype and {x.dtype for x in gradients} == {dtype}
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_a_published_checkpoint_has_its_own_dtype(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "dit.safetensors"
    dit.save(SoraDiT(dit.config("S", 2, num_classes=3)), file, grid=4)
    loaded = []
    for dtype, device in DEFAULTS:
        with defaults(dtype, device):
            loaded.append(dit.load(file))
    loaded.append(dit.load(file))
    for model in loaded[:-1]:
        for mine, theirs in zip(everything(model), everything(loaded[-1]), strict=True):
            assert mine.dtype == theirs.dtype == torch.float32 and torch.equal(mine, theirs)


class Stored:
    """Samples that are there, as those of files are."""

    def __init__(self) -> None:
        self.samples = [Gradients()[index] for index in range(30)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def test_a_run_trains_in_float32_on_its_device(tmp_path: Path) -> None:
    trained, source = [], Stored()
    for number, (dtype, device) in enumerate([(torch.float32, "cpu"), *DEFAULTS]):
        with defaults(dtype, device):
            trainer = Trainer(tiny(steps=2), source, tmp_path / str(number))
            assert trainer.fit(progress=False)
        trained.append([parameter.detach() for parameter in trainer.parameters.values()])
    # Not to the bit: AdamW counts its steps in float64 where that is the default.
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0])
