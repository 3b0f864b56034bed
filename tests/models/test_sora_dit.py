from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.models.text import ByteTextEncoder
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from tests.plain_dit import plain_dit

PATCH = (1, 2, 2)
SHAPES = [(2, 3, 4, 6), (2, 1, 5, 3), (2, 2, 4, 4)]


def small(**options: object) -> SoraDiT:
    """A model with every weight random: at its true start adaLN-Zero makes the blocks invisible."""
    torch.manual_seed(0)
    options = {"dim": 32, "depth": 2, "heads": 2, "in_channels": 2, "patch_size": PATCH, **options}
    model = SoraDiT(SoraDiTConfig(**options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return tuple(-(-size // patch) for size, patch in zip(shape[1:], PATCH, strict=True))


def pack(videos: list[Tensor], *, spare: int = 0, order: str = "tiled") -> tuple[RaggedLatents, PackedLayout]:
    grids = [grid(video.shape) for video in videos]
    tokens = sum(t * h * w for t, h, w in grids)
    layout = PackedLayout.from_grids(
        grids, order=order, capacity=tokens + spare, max_segments=len(videos) + bool(spare), tile_size=16
    )
    elements = sum(video.numel() for video in videos)
    return RaggedLatents.from_list(videos, capacity=elements + spare, max_segments=layout.max_segments), layout


def levels(layout: PackedLayout) -> Conditioning:
    return Conditioning.per_segment(torch.linspace(0.1, 0.9, layout.max_segments), layout)


def videos() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape) for shape in SHAPES]


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_have_the_parameters_of_dit(size: str, millions: int) -> None:
    """As published for patches of 2 (Peebles & Xie 2023, Table 4); fixed positions count there, and not here."""
    dit = {"position": "sincos", "qk_norm": False, "num_classes": 1000, "learned_sigma": True}
    config = SoraDiTConfig.of_size(size, in_channels=4, **dit)
    c = config.dim
    block = (3 * c * c + 3 * c) + (c * c + c) + (8 * c * c + 5 * c) + (6 * c * c + 6 * c)
    ends = (16 * c + c) + (256 * c + c) + (c * c + c) + 1001 * c + (2 * c * c + 2 * c) + (32 * c + 32)
    assert config.depth * block + ends == pytest.approx(1e6 * millions, rel=0.01)
    assert c // config.heads == (72 if size == "XL" else 64)
    if size == "S":
        assert sum(parameter.numel() for parameter in SoraDiT(config).parameters()) == config.depth * block + ends


def test_sizes_take_other_fields_and_bad_ones_are_named() -> None:
    assert SoraDiTConfig.of_size("B", in_channels=16, patch_size=(2, 2, 2)).patch_size == (2, 2, 2)
    with pytest.raises(ValueError, match="size: 'XXL'; it must be one of"):
        SoraDiTConfig.of_size("XXL", in_channels=4)


@pytest.mark.parametrize("position", ["rope", "factorised", "fractional", "sincos", "rope+sincos", "rope+sincos3d"])
@pytest.mark.parametrize("mask", [SpacetimeMask.full(), SpacetimeMask.window(1, 1, 1, causal=True)], ids=str)
def test_a_pack_gives_what_each_video_gives_alone(position: str, mask: SpacetimeMask) -> None:
    model = small(position=position, mask=mask)
    latents, layout = pack(videos(), spare=9)
    latents.flat[-9:] = float("nan")
    sigma = torch.tensor([0.2, 0.5, 0.9, 0.0])
    together = model(latents, layout, Conditioning.per_segment(sigma, layout)).to_list()
    for index, video in enumerate(videos()):
        single, single_layout = pack([video], order="raster")
        level = Conditioning.per_segment(sigma[index : index + 1], single_layout)
        alone = model(single, single_layout, level).to_list()[0]
        torch.testing.assert_close(together[index], alone, rtol=1e-4, atol=1e-5)


def test_text_and_labels_reach_their_own_segment_only() -> None:
    encoder = ByteTextEncoder(16, layers=1)
    model = small(text_dim=16, pooled_dim=16, num_classes=5)
    latents, layout = pack(videos())

    def run(prompts: list[str], labels: list[int]) -> list[Tensor]:
        text = encoder(*encoder.tokenize(prompts, max_segments=layout.max_segments))
        return model(latents, layout, levels(layout), text=text, labels=torch.tensor(labels)).to_list()

    before = run(["a", "bcd", ""], [0, 1, 2])
    for index, changed in ((1, run(["a", "xyz", ""], [0, 1, 2])), (2, run(["a", "bcd", ""], [0, 1, 5]))):
        for segment in range(3):
            assert torch.equal(before[segment], changed[segment]) == (segment != index)


def test_a_new_model_predicts_zero_and_every_weight_learns() -> None:
    torch.manual_seed(0)
    latents, layout = pack(videos())
    fresh = SoraDiT(SoraDiTConfig(dim=32, depth=1, heads=2, in_channels=2, patch_size=PATCH))
    assert not fresh(latents, layout, levels(layout)).flat.any()
    encoder = ByteTextEncoder(16, layers=1)
    model = small(text_dim=16, pooled_dim=16, num_classes=5, mlp="swiglu", position="factorised")
    text = encoder(*encoder.tokenize(["a", "b", "c"]))
    model(latents, layout, levels(layout), text=text, labels=torch.tensor([0, 1, 2])).flat.square().sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_a_learned_variance_doubles_the_channels() -> None:
    latents, layout = pack(videos(), spare=3)
    output = small(learned_sigma=True)(latents, layout, levels(layout))
    assert [tuple(video.shape) for video in output.to_list()] == [(4, *shape[1:]) for shape in SHAPES]


def test_a_flow_map_begins_as_the_model_whose_weights_it_takes() -> None:
    """To the bit, whatever level it is to lead to; afterwards that matters."""
    plain, latents_layout = small(), pack(videos())
    latents, layout = latents_layout
    torch.manual_seed(0)
    flow_map = SoraDiT(replace(plain.config, sigma_end=True))
    assert not flow_map.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    here = levels(layout)
    there = replace(here, sigma_end=here.sigma / 2)
    said = plain(latents, layout, here).flat
    assert all(torch.equal(flow_map(latents, layout, one).flat, said) for one in (here, there))
    torch.nn.init.normal_(flow_map.end_embedder.mlp[2].weight)
    assert not torch.allclose(flow_map(latents, layout, there).flat, said, atol=1e-3)
    nowhere = replace(here, sigma_end=here.sigma)
    assert torch.equal(flow_map(latents, layout, here).flat, flow_map(latents, layout, nowhere).flat)
    with pytest.raises(ValueError, match="built without"):
        plain(latents, layout, there)


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_the_official_dit_is_a_special_case(eps: float) -> None:
    dit = {"position": "sincos", "qk_norm": False, "num_classes": 7, "learned_sigma": True, "discrete_time": True}
    model = small(patch_size=(1, 2, 2), **dit, eps=eps)
    torch.manual_seed(2)
    images = [torch.randn(2, 8, 6), torch.randn(2, 4, 10)]
    latents, layout = pack([image[:, None] for image in images])
    timesteps, labels = torch.tensor([37.0, 912.0]), torch.tensor([3, 7])
    conditioning = Conditioning.per_segment((timesteps + 1) / 1000, layout)
    output = model(latents, layout, conditioning, labels=labels).to_list()
    weights = dict(model.named_parameters())
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].unflatten(1, (2, 2, 2))
    for index, image in enumerate(images):
        expected = plain_dit(weights, image, float(timesteps[index]), int(labels[index]), heads=2, eps=eps)
        torch.testing.assert_close(output[index][:, 0], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@torch._dynamo.config.patch(error_on_recompile=True)
def test_it_compiles_once_for_every_mix_of_shapes() -> None:
    torch._dynamo.reset()
    model = small(mask=SpacetimeMask.frame_causal())
    step = torch.compile(lambda *inputs: model(*inputs).flat.square().mean(), fullgraph=True, backend="aot_eager")
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(2, *torch.randint(1, 6, (3,), generator=generator).tolist()) for _ in range(3)]
        latents = RaggedLatents.from_list([torch.randn(s) for s in shapes], capacity=1000, max_segments=4)
        grids = [grid(shape) for shape in shapes]
        layout = PackedLayout.from_grids(grids, order="tiled", capacity=160, max_segments=4, tile_size=16)
        loss = step(latents, layout, levels(layout))
        loss.backward()
        torch.testing.assert_close(loss, model(latents, layout, levels(layout)).flat.square().mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "nowhere"}, "position: 'nowhere'"),
        ({"position": "rope+rope"}, "position: 'rope.rope'"),
        ({"heads": 5}, "heads: 5"),
        ({"patch_size": (1, 2)}, "patch_size"),
        ({"mlp": "relu"}, "mlp: 'relu'"),
        ({"depth": 0}, "depth: 0"),
    ],
)
def test_bad_configurations_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_calls_are_named() -> None:
    latents, layout = pack(videos())
    with pytest.raises(ValueError, match="text: None"):
        small(text_dim=16)(latents, layout, levels(layout))
    with pytest.raises(ValueError, match="labels: None"):
        small(num_classes=3)(latents, layout, levels(layout))
    with pytest.raises(ValueError, match="labels: shape"):
        small(num_classes=3)(latents, layout, levels(layout), labels=torch.zeros(5))


@torch.no_grad()
def test_what_is_prepared_once_serves_many_levels() -> None:
    """Modulation of several noise levels in one go, keys and values of the text made before."""
    model, encoder = small(text_dim=16, pooled_dim=16), ByteTextEncoder(16, layers=1)
    text = encoder(*encoder.tokenize(["a", "bcd", ""]))
    latents, layout = pack(videos())
    several = [levels(layout), Conditioning.per_segment(torch.tensor([0.9, 0.2, 0.0]), layout)]
    segment = several[0].segment.repeat(2)
    tables = model.modulations(torch.cat([one.sigma for one in several]), segment, text, None)
    prepared = replace(model.prepare(layout, several[0], text), texts=model.read(text))
    for step, conditioning in enumerate(several):
        own = tuple(tuple(table[3 * step : 3 * step + 3] for table in layer) for layer in tables)
        said = model.denoise(latents, replace(prepared, modulations=own))
        torch.testing.assert_close(said.flat, model(latents, layout, conditioning, text).flat, rtol=1e-5, atol=1e-5)
