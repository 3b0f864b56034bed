import pytest
import torch

from sora_fast.generation.engine import Engine
from sora_fast.generation.step_cache import FirstBlockCache
from sora_fast.generation.tasks import Request
from sora_fast.models import SoraDiT, SoraDiTConfig
from sora_fast.ops import adaln
from sora_fast.packing import Conditioning, PackedLayout
from tests.generation.random_engine import random_engine

REQUESTS = [Request("left", 3, 10, 14, guidance=2.0, seed=1), Request("right", 1, 16, 8, seed=2)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return random_engine(depth=3, std=0.05)  # of larger weights every step would change much


def test_a_threshold_of_nothing_gives_the_same_bits(engine: Engine) -> None:
    """0 uses no cache; one below any change is used in vain."""
    plain = engine.generate(REQUESTS, steps=8)
    for threshold in (0.0, 1e-12):
        cached = engine.generate(REQUESTS, steps=8, cache=threshold)
        assert engine.latency.skipped == 0
        for one, other in zip(plain, cached, strict=True):
            assert torch.equal(one, other)


def test_steps_that_change_little_are_cut_short(engine: Engine) -> None:
    plain = engine.generate(REQUESTS, steps=20)
    errors = []
    for threshold in (0.2, 0.35):
        cached = engine.generate(REQUESTS, steps=20, cache=threshold)
        errors.append(max((a - b).abs().max().item() for a, b in zip(plain, cached, strict=True)))
        skipped = engine.latency.skipped
        assert 0 < skipped < engine.latency.calls == 20
        assert f"{skipped} of 20 cut short by the cache" in str(engine.latency)
    assert 0 < errors[0] < errors[1]


def test_what_is_cut_short_is_normed_as_the_blocks_would() -> None:
    """With the model's own eps: of the same latents the second call leaves the blocks out, and gives the same."""
    torch.manual_seed(0)
    model = SoraDiT(SoraDiTConfig(dim=16, depth=2, heads=2, in_channels=2, eps=0.5)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    layout = PackedLayout.from_grids([(1, 3, 4)])
    prepared = model.prepare(layout, Conditioning.per_segment(torch.tensor([0.5]), layout))
    cache, x = FirstBlockCache(model, 0.5), torch.randn(12, 16)
    h = adaln(x, *prepared.modulations[0][:2], prepared.shared.rows, eps=0.5)
    (first_x, first), (second_x, second) = (cache.trunk(x, h, prepared) for _ in range(2))
    assert cache.skipped == 1
    torch.testing.assert_close(second_x, first_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4)


def test_errors(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"cache: 0\.1 with 7 steps; .* it takes 8"):
        engine.generate(REQUESTS, steps=7, cache=0.1)
    with pytest.raises(ValueError, match=r"cache: 1\.5; it must be a share"):
        engine.generate(REQUESTS, steps=8, cache=1.5)
