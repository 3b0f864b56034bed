import torch
from torch import Tensor

from sora_fast.nn import PatchEmbed3D
from sora_fast.ops.patch_embed import FactorisedPosition
from sora_fast.packing import PackedLayout, RaggedLatents

PATCH = (2, 1, 3)
SHAPES = [(2, 3, 2, 4), (2, 1, 1, 3)]


def pack() -> tuple[RaggedLatents, PackedLayout]:
    torch.manual_seed(0)
    latents = RaggedLatents.from_list([torch.randn(shape) for shape in SHAPES])
    return latents, PackedLayout.from_grids([(2, 2, 2), (1, 1, 1)], order="tiled", capacity=11, tile_size=16)


def embedded(latents: RaggedLatents, layout: PackedLayout, module: PatchEmbed3D) -> list[Tensor]:
    """Token after token: the pixels of its patch in the order (c, t, h, w), zeros beyond the edge, times the weight."""
    videos, rows = latents.to_list(), []
    for segment, place in zip(layout.segment_ids.tolist(), layout.coords.tolist(), strict=True):
        if segment < 0:
            rows.append(torch.zeros(module.proj.out_features))
            continue
        patch = torch.zeros(2, *PATCH)
        for c, dt, dh, dw in torch.cartesian_prod(*map(torch.arange, patch.shape)).tolist():
            t, h, w = (i * size + d for i, size, d in zip(place, PATCH, (dt, dh, dw), strict=True))
            if t < videos[segment].shape[1] and w < videos[segment].shape[3]:
                patch[c, dt, dh, dw] = videos[segment][c, t, h, w]
        rows.append(module.proj.weight @ patch.flatten() + module.proj.bias)
    return rows


def test_tokens_are_linear_maps_of_their_patches() -> None:
    latents, layout = pack()
    module = PatchEmbed3D(8, 2, PATCH)
    expected = torch.stack(embedded(latents, layout, module))
    torch.testing.assert_close(module(latents, layout), expected)
    used = layout.segment_ids[:, None] >= 0
    position = torch.randn(11, 8)
    torch.testing.assert_close(module(latents, layout, position), expected + torch.where(used, position, 0))
    tables = FactorisedPosition(*torch.randn(3, 2, 8).unbind(0))
    t, h, w = layout.coords.unbind(1)
    added = torch.where(used, tables.t[t] + tables.h[h] + tables.w[w], 0)
    torch.testing.assert_close(module(latents, layout, tables), expected + added)


def test_autocast_reaches_the_op() -> None:
    latents, layout = pack()
    module = PatchEmbed3D(8, 2, PATCH)
    for position in (None, torch.zeros(11, 8), FactorisedPosition(t=torch.zeros(2, 8))):
        with torch.autocast("cpu", torch.bfloat16):
            tokens = module(latents, layout, position)
        assert tokens.dtype == torch.bfloat16
        torch.testing.assert_close(tokens.float(), module(latents, layout), rtol=0.02, atol=0.02)
