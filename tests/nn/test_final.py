import pytest
import torch

from sora_fast import use_backend
from sora_fast.nn import FinalLayer
from sora_fast.nn.final import FinalLayerConfig
from sora_fast.packing import PackedLayout, RaggedLatents

PATCH = (1, 2, 3)
SHAPES = [(2, 2, 4, 6), (2, 1, 3, 5)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("multiple", [1, 2])
def test_every_pixel_is_its_place_in_its_token_s_row(multiple: int, fused: bool) -> None:
    torch.manual_seed(0)
    like = RaggedLatents.from_list([torch.zeros(shape) for shape in SHAPES])
    layout = PackedLayout.from_grids([(2, 2, 2), (1, 2, 2)], order="tiled", capacity=14, tile_size=16)
    module = FinalLayer(8, 2, PATCH, multiple=multiple, config=FinalLayerConfig(fused=fused))
    torch.nn.init.normal_(module.linear.weight)
    torch.nn.init.normal_(module.linear.bias)
    h = torch.randn(14, 8)
    rows = h @ module.linear.weight.T + module.linear.bias
    places = torch.cat([layout.segment_ids[:, None], layout.coords], dim=1).tolist()
    token = {tuple(place): row for place, row in zip(places, rows, strict=True)}
    videos = module(h, layout, like).to_list()
    for segment, ((channels, *sides), video) in enumerate(zip(SHAPES, videos, strict=True)):
        assert video.shape == (channels * multiple, *sides)
        for c, t, y, x in torch.cartesian_prod(*map(torch.arange, video.shape)).tolist():
            row = token[segment, t, y // 2, x // 3]
            column = ((y % 2) * 3 + x % 3) * channels * multiple + c
            torch.testing.assert_close(video[c, t, y, x], row[column])


def test_starts_at_zero() -> None:
    like = RaggedLatents.from_list([torch.randn(SHAPES[0])])
    layout = PackedLayout.from_grids([(2, 2, 2)])
    module = FinalLayer(8, 2, PATCH)
    assert not module(torch.randn(8, 8), layout, like).flat.any()
    assert not any(table.any() for table in module.adaLN_modulation(torch.randn(3, 8)))


@pytest.mark.parametrize("autocast", [False, True])
def test_both_ways_give_the_same(autocast: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    like = RaggedLatents.from_list([torch.zeros(shape) for shape in SHAPES]).to(device)
    layout = PackedLayout.from_grids([(2, 2, 2), (1, 2, 2)], capacity=14).to(device)
    h = torch.randn(14, 8, device=device, requires_grad=True)
    results = []
    for fused in (False, True):
        module = FinalLayer(8, 2, PATCH, config=FinalLayerConfig(fused=fused)).to(device)
        torch.manual_seed(1)
        for parameter in module.linear.parameters():
            torch.nn.init.normal_(parameter)
        # The interpreter is not trusted with bf16.
        with use_backend("torch" if autocast else "triton"), torch.autocast(device.type, enabled=autocast):
            flat = module(h, layout, like).flat
        assert flat.dtype == (torch.get_autocast_dtype(device.type) if autocast else torch.float32)
        leaves = [h, *module.linear.parameters()]
        results.append([flat, *torch.autograd.grad(flat.float().square().sum(), leaves)])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-2 if autocast else 1e-4, atol=1e-5)
