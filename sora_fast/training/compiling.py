"""torch.compile of the loss of a pack, applied from outside: the whole of it as one graph, or the model's blocks."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from sora_fast.training.compiler import cpp_problem

log = logging.getLogger(__name__)

SCOPES = ("blocks", "model")


def compile_loss(
    loss_of: nn.Module, blocks: Sequence[nn.Module], *, backend: str, scope: str, device: torch.device
) -> str:
    """Compile in place, without breaks, for static shapes: one compilation a run. Returns a line that says what.

    loss_of: the loss of a pack. blocks: of the model in it; they are alike, so the depth costs no compilation.
    scope: one of `SCOPES`. On 2 cores, the demo's model starts in 32 s by block, with steps of 0.20 s, and in 55 s as
        one graph, with steps of 0.15 s: worth it from some 500 steps on (benchmarks/results/cpu/compile_scope.json; in
        another run, beside other work, steps took 0.22 and 0.25 s). Uncompiled they take 0.23 s.
    backend: torch.compile's. Where a CPU has no C++ compiler nothing is compiled, with a warning.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope: {scope!r}; it must be one of {', '.join(SCOPES)}")
    if backend == "inductor" and device.type == "cpu" and (problem := cpp_problem()):
        log.warning("training without torch.compile, which is slower: it needs a C++ compiler, but %s", problem)
        return "nothing is compiled"
    for module in blocks if scope == "blocks" else [loss_of]:
        module.compile(fullgraph=True, dynamic=False, backend=backend)
    if scope == "blocks":
        return f"compiling the {len(blocks)} blocks, which share one graph"
    return "compiling model and loss as one graph"
