"""An engine whose every weight is random: at its true start adaLN-Zero makes the blocks invisible."""

from dataclasses import replace

import torch

from sora_fast.diffusion.paths import NoisePath
from sora_fast.generation.engine import Engine
from sora_fast.training.run import Networks
from tests.training.test_trainer import tiny


def random_engine(
    *, compile: bool | None = False, std: float = 0.15, path: NoisePath | None = None, **model: object
) -> Engine:
    """Reads text by cross-attention and pooled. std: of the weights; model: other fields of its configuration."""
    config = tiny()
    config = replace(config, path=path or config.path, model=replace(config.model, **{"depth": 2, **model}))
    torch.manual_seed(0)
    networks = Networks(config)
    for parameter in networks.model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return Engine(networks, compile=compile)
