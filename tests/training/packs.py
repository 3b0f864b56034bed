"""Packs of any content in one shape, as training makes them."""

from dataclasses import replace

import numpy as np
import torch

from sora_fast.diffusion.clean import clean_frames, random_clean_ends
from sora_fast.diffusion.join import join_latents, join_layouts, join_tokens
from sora_fast.diffusion.noise import noise_like
from sora_fast.packing import PackedLayout, RaggedLatents, token_grid
from sora_fast.training.data.batches import BatchConfig, Prompts
from sora_fast.training.run import Networks, RunConfig
from sora_fast.training.step import NoisyPack
from tests.training.test_trainer import tiny

CAPACITY, SEGMENTS, TEXT = 128, 6, 64
PIXELS = SEGMENTS * 8 * 12 * 12  # of the largest clips: what is dropped has pixels too


def networks(*, depth: int = 1, precision: str = "float32", seed: int = 0) -> Networks:
    """Small ones, in which nothing is zero any more, as after some steps."""
    config: RunConfig = tiny(precision=precision)
    config = replace(config, model=replace(config.model, depth=depth))
    torch.manual_seed(seed)
    made = Networks(config)
    with torch.no_grad():
        for parameter in made.trained().values():
            if not parameter.count_nonzero():
                parameter.normal_(std=0.05)
    return made


def pack(of: Networks, seed: int) -> NoisyPack:
    """Images and short and long clips; some tokens dropped, some clean; captions, empty ones, or none at all."""
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    shapes = [
        (int(random.integers(1, 9)), *map(int, random.integers(4, 13, size=2))) for _ in range(random.integers(7))
    ]
    videos = [torch.randn(1, *shape, generator=generator) for shape in shapes]
    grids = [token_grid(video.shape, of.patch_size) for video in videos]
    keep = [_kept(int(np.prod(grid)), random) for grid in grids]
    layout = PackedLayout.from_grids(
        grids, order="tiled", capacity=CAPACITY, max_segments=SEGMENTS, keep=keep if videos else None
    )
    latents = RaggedLatents.from_list(videos, capacity=PIXELS, max_segments=SEGMENTS)
    captions = ["up" if random.random() < 0.6 and seed % 3 else "" for _ in videos]
    if seed % 7 == 6:
        prompts = of.no_prompts(BatchConfig(text_capacity=TEXT, max_segments=SEGMENTS))
    else:
        prompts = Prompts(*of.text.tokenize(captions, capacity=TEXT, max_segments=SEGMENTS))
    sigma = of.path.sample_sigma(layout, generator)
    clean = clean_frames(layout, *random_clean_ends(layout, generator, share=0.5))
    return NoisyPack(latents, layout, prompts, sigma, noise_like(latents, generator), clean)


def _kept(tokens: int, random: np.random.Generator) -> np.ndarray | None:
    """So few that six of them fit."""
    if tokens <= CAPACITY // SEGMENTS:
        return None
    return random.permutation(tokens)[: CAPACITY // SEGMENTS]


def joined(first: NoisyPack, second: NoisyPack) -> NoisyPack:
    """Both in one pack of twice the capacity."""
    layouts, texts = (first.layout, second.layout), (first.prompts.layout, second.prompts.layout)
    noises = [replace(pack.latents, flat=pack.noise) for pack in (first, second)]
    return NoisyPack(
        join_latents(first.latents, second.latents),
        join_layouts(*layouts),
        Prompts(join_tokens(first.prompts.ids, second.prompts.ids, texts), join_layouts(*texts)),
        torch.cat([first.sigma, second.sigma]),
        join_latents(*noises).flat,
        join_tokens(first.clean, second.clean, layouts),
    )
