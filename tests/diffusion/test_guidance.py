import pytest
import torch

from sora_fast.diffusion import Guided, Heun, RectifiedFlow, clean_frames, noise_like, sample
from sora_fast.diffusion.pixels import token_to_pixels
from sora_fast.models.text import PackedText
from sora_fast.ops.segment_mean import segment_mean
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents, RowIndex
from tests.diffusion.stand_ins import PATCH, layout_of, pixel_sigma

SHAPES = [(4, 2, 3, 4), (4, 1, 2, 2), (4, 3, 2, 3)]


def setting():
    generator = torch.Generator().manual_seed(0)
    videos = [torch.randn(shape, generator=generator) for shape in SHAPES]
    latents = RaggedLatents.from_list(videos, capacity=260, max_segments=4)
    layout = layout_of(videos, order="tiled", capacity=20, max_segments=4, tile_size=16)
    sigma = torch.rand(4, generator=generator)
    clean = clean_frames(layout, torch.tensor([1, 0, 0, 0]), torch.tensor([0, 0, 1, 0]))
    return latents, layout, Conditioning.with_clean(sigma, clean, layout)


def text(lengths: list[int], *, seed: int, spare: int) -> PackedText:
    layout = PackedLayout.from_grids([(n, 1, 1) for n in lengths], capacity=sum(lengths) + spare, max_segments=4)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(layout.capacity, 3, generator=generator) * (layout.segment_ids >= 0)[:, None]
    return PackedText(tokens, layout, torch.randn(4, 2, generator=generator))


TEXT, NULL_TEXT = text([3, 1, 5], seed=1, spare=4), text([1, 1, 1], seed=2, spare=0)
LABELS, NULL_LABELS = torch.tensor([3, 1, 4, 1]), torch.full((4,), 9)


def model(latents, layout, conditioning, text=None, labels=None):
    """Every pixel's answer depends on all that concerns it: place, level, labels, all text tokens, pooled text."""
    segment = layout.segment_ids.clamp(min=0)
    value = layout.coords.float() @ torch.tensor([1.0, 0.3, 0.1])
    if labels is not None:
        value = value + labels[segment]
    if text is not None:
        value = value + segment_mean(text.tokens, text.layout)[segment].sum(1) + text.pooled[segment].prod(1)
    place = token_to_pixels(value, layout, PATCH, latents)
    level = pixel_sigma(latents, layout, conditioning).float()
    return latents.with_flat((latents.flat + level) * place)


@pytest.mark.parametrize("given", ["text", "labels", "both"])
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("scale", [1.0, 4.0, torch.tensor([1.0, 2.0, 7.5, 0.0])], ids=["1", "4", "each"])
def test_one_joined_call_is_two_separate_calls(given, channels, scale):
    latents, layout, conditioning = setting()
    names = {"text": ["text"], "labels": ["labels"], "both": ["text", "labels"]}[given]
    having = {"text": TEXT, "labels": LABELS}
    lacking = {"text": NULL_TEXT, "labels": NULL_LABELS}
    guided = Guided(
        model,
        layout,
        scale=scale,
        channels=channels,
        **{name: having[name] for name in names},
        **{f"null_{name}": lacking[name] for name in names},
    )
    result = guided(latents, layout, conditioning)

    with_condition = model(latents, layout, conditioning, **{name: having[name] for name in names})
    without = model(latents, layout, conditioning, **{name: lacking[name] for name in names})
    assert torch.equal(result.shapes, latents.shapes) and torch.equal(result.offsets, latents.offsets)
    scales = torch.as_tensor(scale).expand(4)
    for i, (got, cond, uncond) in enumerate(
        zip(result.to_list(), with_condition.to_list(), without.to_list(), strict=True)
    ):
        expected = uncond + scales[i] * (cond - uncond)
        if channels is not None:
            expected[channels:] = cond[channels:]
        torch.testing.assert_close(got, expected)
        assert not torch.allclose(cond, uncond)


def test_guidance_of_a_model_with_twice_the_channels():
    latents, layout, conditioning = setting()

    def double(latents, layout, conditioning, labels=None):
        videos = model(latents, layout, conditioning, labels=labels).to_list()
        size = 2 * latents.flat.shape[0]
        both = [torch.cat([video, video + 1]) for video in videos]
        # Unused places in the middle stay: the videos are put back where they were.
        output = RaggedLatents.from_list(both, capacity=size)
        offsets = 2 * latents.offsets
        shapes = latents.shapes * torch.tensor([2, 1, 1, 1], dtype=torch.int32)
        return RaggedLatents(output.flat, offsets, shapes)

    guided = Guided(double, layout, scale=3.0, labels=LABELS, null_labels=NULL_LABELS, channels=3)
    result = guided(latents, layout, conditioning)
    with_condition, without = (
        model(latents, layout, conditioning, labels=labels).to_list() for labels in (LABELS, NULL_LABELS)
    )
    for got, cond, uncond in zip(result.to_list(), with_condition, without, strict=True):
        torch.testing.assert_close(got[:3], (uncond + 3 * (cond - uncond))[:3])
        torch.testing.assert_close(got[3:], torch.cat([cond[3:], cond + 1]))


def test_guided_sampling_is_sampling_with_the_guided_prediction():
    latents, layout, _ = setting()
    path = RectifiedFlow()
    noise = latents.with_flat(noise_like(latents, torch.Generator().manual_seed(0)))

    def by_two_calls(latents, layout, conditioning):
        cond, uncond = (model(latents, layout, conditioning, labels=labels) for labels in (LABELS, NULL_LABELS))
        return latents.with_flat(uncond.flat + 2 * (cond.flat - uncond.flat))

    guided = Guided(model, layout, scale=2, labels=LABELS, null_labels=NULL_LABELS)
    results = [
        sample(denoiser, noise, layout, path, Heun(), steps=3, patch_size=PATCH).to_list()
        for denoiser in (guided, by_two_calls)
    ]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_errors_name_the_argument():
    latents, layout, conditioning = setting()
    with pytest.raises(ValueError, match="text, labels: both None"):
        Guided(model, layout, scale=2)
    with pytest.raises(ValueError, match="null_text, null_labels"):
        Guided(model, layout, scale=2, labels=LABELS)
    with pytest.raises(ValueError, match="channels: 0"):
        Guided(model, layout, scale=2, labels=LABELS, null_labels=NULL_LABELS, channels=0)
    guided = Guided(model, layout, scale=2, labels=LABELS, null_labels=NULL_LABELS)
    other = layout_of([torch.zeros(shape) for shape in SHAPES], capacity=20, max_segments=4)
    with pytest.raises(ValueError, match="layout: not the one"):
        guided(latents, other, conditioning)


@pytest.mark.parametrize("guided", [False, True])
def test_tokens_are_sorted_by_row_once_for_all_steps(guided, monkeypatch):
    latents, layout, _ = setting()
    denoiser = Guided(model, layout, scale=2.0, labels=LABELS, null_labels=NULL_LABELS) if guided else model
    sort, sorts = RowIndex.from_index, []
    monkeypatch.setattr(RowIndex, "from_index", staticmethod(lambda *given: sorts.append(given) or sort(*given)))
    for steps in (2, 5):
        sorts.clear()
        sample(denoiser, latents, layout, RectifiedFlow(), Heun(), steps=steps, patch_size=PATCH)
        assert len(sorts) == 1 + guided


def test_other_rows_are_joined_anew():
    latents, layout, conditioning = setting()
    other = Conditioning.with_clean(conditioning.sigma[:4], layout.segment_ids < 0, layout)
    used = Guided(model, layout, scale=2.0, labels=LABELS, null_labels=NULL_LABELS)
    used(latents, layout, conditioning)
    fresh = Guided(model, layout, scale=2.0, labels=LABELS, null_labels=NULL_LABELS)
    results = [guided(latents, layout, other).flat[:200] for guided in (used, fresh)]
    assert torch.equal(*results) and not torch.equal(results[0], used(latents, layout, conditioning).flat[:200])
