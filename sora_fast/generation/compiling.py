"""Compiling the network for sampling on a CPU, and when that is worth its start-up."""

import contextlib
import logging
from collections.abc import Iterator

import torch

from sora_fast.models import SoraDiT
from sora_fast.training.compiler import cpp_problem

log = logging.getLogger(__name__)

# Measured with the demo's model (4 blocks of width 128) on a core: 12.5 s until the first step of one request is done,
# 0.2 s in eager mode; then 8.1 ms a step and not 11.8, of eight mixed requests 42 and not 58. A deeper model starts no
# slower, since its blocks share the graph.
START_UP = 13.0
SAVED = 0.28


def is_worth_it(seconds: float) -> bool:
    """Whether so much work of the network, in eager mode, is enough to save the start-up."""
    return SAVED * seconds > START_UP


def compile_blocks(model: SoraDiT, *, backend: str = "inductor") -> bool:
    """One graph for all blocks and all sizes of a pack. Where that cannot work they stay as they are, with a warning,
    and the result is False."""
    if backend == "inductor" and model.x_embedder.proj.weight.device.type == "cpu" and (problem := cpp_problem()):
        log.warning("sampling without torch.compile, which is slower: it needs a C++ compiler, but %s", problem)
        return False
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=True, backend=backend)
    return True


@contextlib.contextmanager
def any_sizes() -> Iterator[None]:
    """Inside, sizes that happen to agree in the first pack need not in the next one, which would compile anew."""
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        yield
