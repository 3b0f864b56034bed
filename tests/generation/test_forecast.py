from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sora_fast.diffusion import Euler
from sora_fast.generation.forecast import _operations
from sora_fast.generation.phases import Plan
from sora_fast.generation.tasks import Request
from sora_fast.packing import PackedLayout
from tests.generation.random_engine import random_engine

REQUEST = Request("left", 4, 32, 32, guidance=2.0)


@torch.no_grad()
def test_it_says_what_is_then_done() -> None:
    engine = random_engine()
    requests = [REQUEST, replace(REQUEST, steps=2, guidance=1.0), replace(REQUEST, guidance_interval=(0.9, 1.0))]
    forecast = engine.forecast(requests, steps=3)
    engine.generate(requests, steps=3)
    assert forecast.seen == engine.latency.tokens == 256 * (3 * 2 + 2 + 4)
    assert (forecast.videos, forecast.steps, forecast.guided, forecast.tokens) == (3, 3, 3, 768)
    assert forecast.bytes > 0 and forecast.seconds > 0
    assert "3 videos of 768 tokens, 3 steps, all guided: 3,072 tokens through the network" in str(forecast)
    assert "2 steps:" in str(engine.forecast([replace(REQUEST, guidance=1.0)], steps=2))


@torch.no_grad()
def test_its_operations_are_those_that_pytorch_counts() -> None:
    """But for the ends of the network and what is done once, and attention, an op that PyTorch's counter does not see
    into."""
    engine = random_engine(text_dim=None, pooled_dim=None, mlp="swiglu", dim=128)
    engine.networks.text = None
    plain = replace(REQUEST, guidance=1.0)
    options = {"steps": 1, "guidance": False}
    plan = Plan.of([plain], PackedLayout.from_grids([(4, 8, 8)]), engine.networks.path, Euler(), **options)
    attention = 2 * 4 * 128 * 256**2
    with FlopCounterMode(display=False) as counter:
        engine.generate([plain], steps=1)
    counted = counter.get_total_flops()
    assert _operations(engine.networks.model, plan, [256]) - attention == pytest.approx(counted, rel=0.05)
