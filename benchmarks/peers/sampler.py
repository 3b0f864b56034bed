"""The sampler before the engine prepared anything: every step makes its conditioning, modulation, joined pack and pixel
maps anew, and its model runs in eager mode. Only schedules and rows are kept, as they were then."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sora_fast.diffusion import Guided, noise_like
from sora_fast.diffusion.pixels import pixel_segments, spread, token_to_pixels
from sora_fast.generation.engine import Engine
from sora_fast.generation.tasks import Request, pack_requests
from sora_fast.models.text import PackedText
from sora_fast.packing import Conditioning


@torch.no_grad()
def generate(engine: Engine, requests: Sequence[Request], *, steps: int) -> list[Tensor]:
    """As `Engine.generate` with Euler's method, for a rectified flow and guided requests."""
    networks = engine.networks
    packed = pack_requests(requests, codec=networks.codec, patch_size=networks.patch_size)
    layout, data, clean = packed.layout, packed.data, packed.clean
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    model = Guided(
        networks.model,
        layout,
        scale=torch.tensor([request.guidance for request in requests]),
        text=_text(engine, [request.prompt for request in requests]),
        null_text=_text(engine, [""] * len(requests)),
        channels=networks.model.config.in_channels,
    )
    fixed = token_to_pixels(clean, layout, networks.patch_size, data)
    segments = pixel_segments(data)
    sigmas = networks.path.sigmas(steps, layout)
    rows = Conditioning.with_clean(sigmas[0], clean, layout).rows
    x = noise_like(data, generators)
    for now, then in pairwise(sigmas):
        x = torch.where(fixed, data.flat, x)
        said = model(data.with_flat(x), layout, Conditioning.with_clean(now, clean, layout, rows=rows)).flat
        denoised, noise = networks.path.denoise(x, said, spread(now.float(), segments))
        x = x + spread((then - now).float(), segments) * (noise - denoised)
    made = data.with_flat(torch.where(fixed, data.flat, x))
    return [networks.codec.decode(latents) for latents in made.to_list()]


def _text(engine: Engine, prompts: list[str]) -> PackedText:
    return engine.networks.text(*engine.networks.text.tokenize(prompts))
