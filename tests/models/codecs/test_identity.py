import pytest
import torch

from sora_fast.models.codecs import IdentityCodec


def test_identity_gives_the_pixels_back_to_the_bit():
    codec = IdentityCodec(channels=1)
    video = torch.rand(1, 3, 5, 7) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape == codec.spec.latent_shape(3, 5, 7)
    assert torch.equal(codec.decode(latents), video)


def test_a_lead_gives_the_first_frame_a_patch_of_its_own():
    codec = IdentityCodec.for_patches(1, (4, 2, 2))
    video = torch.rand(1, 3, 5, 7) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape == codec.spec.latent_shape(3, 5, 7) == (1, 6, 5, 7)
    assert torch.equal(latents[:, :4], video[:, :1].expand(1, 4, 5, 7))
    assert torch.equal(codec.decode(latents), video)


def test_identity_decodes_into_the_range_of_pixels():
    decoded = IdentityCodec(channels=1).decode(torch.tensor([-3.0, 0.25, 1.5]).view(1, 3, 1, 1))
    assert decoded.flatten().tolist() == [-1, 0.25, 1]


def test_identity_refuses_what_is_no_video():
    with pytest.raises(ValueError, match=r"video: shape \(1, 2, 4, 4\); it must be \(3, T, H, W\)"):
        IdentityCodec().encode(torch.zeros(1, 2, 4, 4))
    with pytest.raises(TypeError, match=r"video: torch\.uint8"):
        IdentityCodec().encode(torch.zeros(3, 2, 4, 4, dtype=torch.uint8))


def test_identity_takes_any_values_as_it_always_did():
    video = torch.tensor([float("nan"), 7.0]).view(1, 2, 1, 1)
    assert torch.equal(IdentityCodec(channels=1).encode(video)[:, 1:], video[:, 1:])
