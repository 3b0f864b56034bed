"""torch.compile of the loss of a pack, applied from outside: the whole of it as one graph, or the model's blocks."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from sora_fast.training.compiler import cpp_problem

log = logging.getLogger(__name__)

SCOPES = ("blocks", "model", "auto")


def compile_loss(
    loss_of: nn.Module,
    blocks: Sequence[nn.Module],
    *,
    backend: str,
    scope: str,
    device: torch.device,
    minutes: float | None,
) -> str:
    """Compile in place, without breaks, for static shapes: one compilation a run. Returns a line that says what.

    loss_of: the loss of a pack; blocks: of the model in it, which are alike and share one graph.
    backend: torch.compile's. scope: one of `SCOPES`. minutes: that the run takes; None: not known.
    Where a CPU has no C++ compiler nothing is compiled, with a warning.
    """
    if backend == "inductor" and device.type == "cpu" and (problem := cpp_problem()):
        log.warning("training without torch.compile, which is slower: it needs a C++ compiler, but %s", problem)
        return "nothing is compiled"
    chosen = choose(len(blocks), minutes) if scope == "auto" else scope
    for module in blocks if chosen == "blocks" else [loss_of]:
        module.compile(fullgraph=True, dynamic=False, backend=backend)
    if chosen == "blocks":
        return f"compiling the {len(blocks)} blocks, which share one graph"
    return "compiling model and loss as one graph"


def choose(depth: int, minutes: float | None) -> str:
    return "blocks"
