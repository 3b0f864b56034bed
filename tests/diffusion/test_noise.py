import pytest
import torch

from sora_fast.diffusion import noise_like
from sora_fast.packing import RaggedLatents


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_one_generator_gives_the_same_noise_again():
    latents = RaggedLatents.empty([(1, 2, 3, 4)], dtype=torch.float64)
    first, again = (noise_like(latents, seeded(1)[0]) for _ in range(2))
    assert torch.equal(first, again) and first.dtype == torch.float64


def test_a_generator_a_video_makes_noise_independent_of_the_pack():
    small, large = (2, 1, 3, 3), (2, 4, 5, 5)
    pack = RaggedLatents.empty([large, small], capacity=300, max_segments=4)
    alone = RaggedLatents.empty([small])
    packed = pack.with_flat(noise_like(pack, seeded(7, 8))).to_list()
    assert torch.equal(packed[1], alone.with_flat(noise_like(alone, seeded(8))).to_list()[0])
    assert packed[0].std().item() == pytest.approx(1, abs=0.15)
    assert not torch.equal(packed[0].flatten()[:18], packed[1].flatten())


def test_too_many_generators():
    with pytest.raises(ValueError, match="2 generators, but there are 1 segments"):
        noise_like(RaggedLatents.empty([(1, 1, 1, 1)]), seeded(1, 2))
