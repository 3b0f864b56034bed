import pytest
import torch

from sora_fast.models.video_vae import CausalVideoVAE, Past, VAEConfig


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("stride", [4, 8])
def test_the_small_form_has_under_a_million_weights(channels: int, stride: int) -> None:
    network = CausalVideoVAE(VAEConfig(3, channels, stride))
    assert sum(p.numel() for p in network.parameters()) <= 1_000_000
    mean, log_variance = network.encode(torch.zeros(8, 3, 16, 24), Past([2]))
    assert mean.shape == log_variance.shape == (2, channels, 16 // stride, 24 // stride)
    assert network.decode(mean, Past([2])).shape == (8, 3, 16, 24)


def test_the_frames_before() -> None:
    """Of each video its own; of the first frame it itself, or what the chunk before has left."""
    frames = torch.arange(12.0).view(12, 1, 1, 1)
    past = Past([2, 1])
    assert past.before(frames).flatten().tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 8, 8, 9, 10]
    assert past.before(frames[:6]).flatten().tolist() == [0, 0, 1, 2, 4, 4]
    assert [kept.flatten().tolist() for kept in past.kept] == [[7, 11], [3, 5]]
    following = Past([1, 2], past.kept)
    assert following.before(frames).flatten().tolist() == [7, 0, 1, 2, 11, 4, 5, 6, 7, 8, 9, 10]


def test_configuration_errors() -> None:
    for options, message in (
        ({"spatial_stride": 2}, "spatial_stride: 2; it must be 4 or 8"),
        ({"video_channels": 4}, "video_channels: 4; it must be 1"),
        ({"widths": (8, 8)}, "widths"),
        ({"channels": 0}, "channels: 0; it must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            VAEConfig(**options)
