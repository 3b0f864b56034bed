import pytest
import torch

from sora_fast.models.codecs import LatentSpec

CAUSAL = LatentSpec(channels=16, spatial_stride=8, temporal_stride=4, first_frame_alone=True, video_channels=3)


def test_what_the_strides_do_not_divide_is_filled_up() -> None:
    assert CAUSAL.latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert CAUSAL.latent_shape(1, 8, 8) == (16, 1, 1, 1)
    # 16 frames and the last one three times: 13 would be all that 4 latent frames hold.
    assert CAUSAL.latent_shape(16, 479, 825) == (16, 5, 60, 104)
    assert LatentSpec(channels=4, spatial_stride=8, temporal_stride=2).latent_shape(5, 16, 1) == (4, 3, 2, 1)
    with pytest.raises(ValueError, match="height: 0; it must be at least 1"):
        CAUSAL.latent_shape(1, 0, 8)


def test_the_largest_video_of_a_latent_shape() -> None:
    assert CAUSAL.video_shape((16, 5, 60, 104)) == (3, 17, 480, 832)
    for frames in range(1, 20):
        assert 0 <= CAUSAL.video_shape(CAUSAL.latent_shape(frames, 8, 8))[1] - frames < 4
    assert LatentSpec(channels=1, lead=3).video_shape((1, 8, 5, 7)) == (1, 5, 5, 7)


def test_where_a_latent_frame_ends() -> None:
    assert [frames for frames in range(1, 11) if CAUSAL.divides(frames)] == [1, 5, 9]
    assert [CAUSAL.nearest(frames) for frames in (2, 7, 8)] == ["1 or 5", "5 or 9", "5 or 9"]
    plain = LatentSpec(channels=1, temporal_stride=2)
    assert [frames for frames in range(1, 5) if plain.divides(frames)] == [2, 4] and plain.nearest(1) == "2"


def test_each_channel_has_its_own_mean_and_deviation() -> None:
    spec = LatentSpec(channels=2, mean=(1.0, -2.0), std=(0.5, 4.0))
    codes = torch.randn(2, 3, 4, 4)
    latents = spec.normalized(codes)
    torch.testing.assert_close(latents[0], (codes[0] - 1) / 0.5)
    torch.testing.assert_close(latents[1], (codes[1] + 2) / 4)
    torch.testing.assert_close(spec.raw(latents), codes)
    one = LatentSpec(channels=2, mean=1.0, std=2.0)
    torch.testing.assert_close(one.normalized(codes), (codes - 1) / 2)
    assert LatentSpec(channels=2).normalized(codes) is codes
    with pytest.raises(ValueError, match="mean: 3 numbers; it must be one, or one for each of 2"):
        LatentSpec(channels=2, mean=(0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"std: 0\.0; it must be positive"):
        LatentSpec(channels=2, std=0.0)
