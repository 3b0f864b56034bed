import pytest
import torch
from torch import Tensor

from sora_fast.models.codecs import UnfitFrames
from sora_fast.packing import RaggedLatents
from tests.models.codecs.means import Means

CODEC = Means()
SHAPES = [(1, 16, 6, 6), (1, 1, 5, 7), (1, 14, 6, 3), (1, 17, 1, 1)]


def clip(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("shape", SHAPES)
def test_no_frame_is_lost_at_any_size(shape: tuple[int, ...]) -> None:
    video = torch.linspace(-1, 1, shape[1]).view(1, -1, 1, 1).expand(shape)
    latents = CODEC.encode(video)
    assert latents.shape == CODEC.spec.latent_shape(*shape[1:])
    decoded = CODEC.decode(latents, shape[1:])
    assert decoded.shape == shape
    # The last frame is among four of which the others are it, or what came before it.
    assert torch.equal(decoded[:, 0], video[:, 0]) and (decoded - video).abs().max() <= 3.001 / max(1, shape[1] - 1)
    assert torch.equal(torch.cat(list(CODEC.stream(latents, shape[1:])), dim=1), decoded)
    assert CODEC.decode(latents).shape == CODEC.spec.video_shape(tuple(latents.shape))


def test_latents_are_normalised() -> None:
    assert torch.allclose(CODEC.encode(torch.full((1, 5, 2, 2), 0.75)), torch.tensor(0.125))


def test_ragged_videos_both_ways() -> None:
    videos = [clip(*shape, seed=seed) for seed, shape in enumerate(SHAPES)]
    latents = CODEC.encode_ragged(RaggedLatents.from_list(videos, max_segments=6))
    assert latents.max_segments == 6
    for one, video in zip(latents.to_list(), videos, strict=True):
        assert torch.equal(one, CODEC.encode(video))
    decoded = CODEC.decode_ragged(latents, [tuple(shape[1:]) for shape in SHAPES])
    assert [tuple(video.shape) for video in decoded.to_list()] == SHAPES
    for one, video, shape in zip(decoded.to_list(), latents.to_list(), SHAPES, strict=True):
        assert torch.equal(one, CODEC.decode(video, shape[1:]))


@pytest.mark.parametrize("frames", [17, 18, 20])
def test_an_end_falls_into_the_latent_frames_that_it_has_in_the_whole(frames: int) -> None:
    video = clip(1, frames, 4, 4)
    whole = CODEC.encode(video)
    for before in (1, 5, 9, 13):
        end = CODEC.encode_end(video[:, before:], before)
        assert torch.equal(end, whole[:, CODEC.spec.latent_frames(before) :])
        # One frame off, or encoded as if it was a video, it is something else.
        assert not torch.allclose(CODEC.encode_end(video[:, before - 1 : -1], before), end, atol=1e-2)
        alone = CODEC.encode(video[:, before:])
        assert alone.shape != end.shape or not torch.allclose(alone, end, atol=1e-2)
    with pytest.raises(ValueError, match="before: 6 ends inside a latent frame; 5 or 9 would not"):
        CODEC.encode_end(video[:, 6:], 6)
    assert torch.equal(CODEC.encode_end(video, 0), whole)


def test_what_is_no_video_is_named() -> None:
    with pytest.raises(ValueError, match=r"video: shape \(3, 1, 4, 4\); it must be \(1, T, H, W\)"):
        CODEC.encode(torch.zeros(3, 1, 4, 4))
    with pytest.raises(TypeError, match=r"video: torch\.uint8"):
        CODEC.encode(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    for value in (1.5, float("nan"), float("inf")):
        with pytest.raises(UnfitFrames, match=r"they must lie in \[-1, 1\]"):
            CODEC.encode(torch.tensor([0.0, value]).view(1, 1, 1, 2))


def test_latents_of_another_codec_are_named() -> None:
    with pytest.raises(ValueError, match=r"latents: \(3, 1, 2, 2\); those of this codec are \(1, T, H, W\)"):
        CODEC.decode(torch.zeros(3, 1, 2, 2))
    with pytest.raises(ValueError, match=r"latents: \(1, 4, 2, 2\); those of a video of 16x4x4 are \(1, 5, 2, 2\)"):
        CODEC.decode(torch.zeros(1, 4, 2, 2), (16, 4, 4))
