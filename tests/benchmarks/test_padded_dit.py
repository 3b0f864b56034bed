"""The peers of training compute what the packed model computes: the same loss, the same gradients."""

import pytest
import torch

from benchmarks.peers.padded_dit import PaddedDiT, padded_batch
from sora_fast.diffusion import RectifiedFlow, training_loss
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.packing import PackedLayout, RaggedLatents

CONFIG = SoraDiTConfig(
    dim=48, depth=2, heads=2, in_channels=3, patch_size=(1, 2, 2), position="rope+sincos3d", rope_theta=100.0
)
PATH = RectifiedFlow(prediction="clean")


@pytest.mark.parametrize("grids", [[(3, 2, 4), (1, 5, 3), (2, 2, 2)], [(2, 3, 2)] * 3], ids=["padded", "of one shape"])
def test_a_padded_batch_has_the_loss_and_gradients_of_the_packed_one(grids: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(0)
    model = SoraDiT(CONFIG).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    videos = [torch.randn(3, t, 2 * h, 2 * w).double() for t, h, w in grids]
    noises, sigma = [torch.randn_like(video) for video in videos], torch.rand(len(grids)).double()
    latents, noise = (RaggedLatents.from_list(part) for part in (videos, noises))
    layout = PackedLayout.from_grids(grids, order="tiled", capacity=80)
    packed = training_loss(model, latents, layout, PATH, sigma, noise=noise.flat, patch_size=CONFIG.patch_size)
    wanted = torch.autograd.grad(packed, list(model.parameters()))

    batch = padded_batch(model, videos, noises, sigma)
    assert (batch.real is None) == (len(set(grids)) == 1)
    padded = PaddedDiT(model, PATH)(*batch.tensors)
    # Sines of the timestep and of positions are float32 in both.
    torch.testing.assert_close(padded, packed, rtol=1e-6, atol=1e-6)
    for got, want in zip(torch.autograd.grad(padded, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
