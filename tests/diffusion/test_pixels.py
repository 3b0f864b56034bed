import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_fast.diffusion.pixels import channel_half, pixel_segments, pixel_tokens, spread, token_to_pixels
from sora_fast.packing import PackedLayout, RaggedLatents

extents = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 7), st.integers(1, 7))


@st.composite
def packs(draw):
    """Videos of any sizes with their layout, tokens dropped, capacities larger than needed."""
    channels = draw(st.integers(1, 2))
    shapes = [(channels, *draw(extents)[1:]) for _ in range(draw(st.integers(1, 4)))]
    patch = draw(st.sampled_from([(1, 2, 2), (2, 3, 2), (1, 1, 1)]))
    grids = [tuple(-(-size // p) for size, p in zip(shape[1:], patch, strict=True)) for shape in shapes]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    keep = None
    if draw(st.booleans()):
        keep = [rng.choice(np.prod(grid), rng.integers(0, np.prod(grid) + 1), replace=False) for grid in grids]
    spare = draw(st.integers(0, 3))
    tokens = sum(int(np.prod(g)) if keep is None else len(keep[i]) for i, g in enumerate(grids))
    layout = PackedLayout.from_grids(
        grids,
        order=draw(st.sampled_from(["raster", "tiled"])),
        keep=keep,
        capacity=tokens + spare,
        max_segments=len(grids) + spare,
        tile_size=16,
    )
    elements = sum(int(np.prod(shape)) for shape in shapes)
    latents = RaggedLatents.from_list(
        [torch.zeros(shape) for shape in shapes], capacity=elements + 5 * spare, max_segments=len(grids) + spare
    )
    return shapes, patch, layout, latents


@given(packs())
def test_every_pixel_finds_its_token(pack):
    shapes, patch, layout, latents = pack
    tokens = {
        (segment, *coords): token
        for token, (segment, coords) in enumerate(zip(layout.segment_ids.tolist(), layout.coords.tolist(), strict=True))
        if segment >= 0
    }
    expected_token, expected_segment = [], []
    for segment, shape in enumerate(shapes):
        for _, t, h, w in np.ndindex(*shape):
            place = (segment, t // patch[0], h // patch[1], w // patch[2])
            expected_token.append(tokens.get(place, layout.capacity))
            expected_segment.append(segment)
    rest = latents.flat.shape[0] - len(expected_token)
    assert pixel_tokens(layout, patch, latents).tolist() == expected_token + [layout.capacity] * rest
    assert pixel_segments(latents).tolist() == expected_segment + [latents.max_segments] * rest


def test_token_values_reach_their_pixels_and_the_fill_the_others():
    layout = PackedLayout.from_grids([(1, 1, 2)], keep=[np.array([1])])
    latents = RaggedLatents.from_list([torch.zeros(1, 1, 2, 3)], capacity=7)
    pixels = token_to_pixels(torch.tensor([5.0]), layout, (1, 2, 2), latents, fill=-1)
    assert pixels.tolist() == [-1, -1, 5, -1, -1, 5, -1]
    with pytest.raises(ValueError, match=r"values: shape \(2,\); it must be \[1\]"):
        token_to_pixels(torch.zeros(2), layout, (1, 2, 2), latents)


def test_spread_keeps_the_dtype():
    assert spread(torch.tensor([True]), torch.tensor([1, 0])).tolist() == [False, True]
    assert spread(torch.tensor([2], dtype=torch.int32), torch.tensor([0])).dtype == torch.int32


def test_channel_halves():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 2, 3, 1), (4, 1, 2, 2)]
    videos = [torch.randn(shape, generator=generator) for shape in shapes]
    output = RaggedLatents.from_list(videos, capacity=50, max_segments=3)
    like = RaggedLatents.from_list([video[:2] for video in videos], capacity=22, max_segments=3)
    for half in range(2):
        got = like.with_flat(channel_half(output, like, half)).to_list()
        for video, part in zip(videos, got, strict=True):
            assert torch.equal(part, video[2 * half : 2 * half + 2])
