"""torch.compile as it is measured: whole graphs, and a backward pass that may run many times."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch._functorch import config as functorch

from benchmarks.cases import Case
from benchmarks.entrants import Entrant, Ours
from sora_fast import use_backend


def keep_buffers() -> AbstractContextManager[Any]:
    """Inside, a compiled backward pass leaves what it reads as it was, so that the next round finds it."""
    return functorch.patch(donated_buffer=False)


def ready(entrant: Entrant) -> Entrant:
    """`entrant`, compiled now, so that a later call takes nothing but its graph: to enter a context costs as much as
    the smallest ops do."""
    with keep_buffers():
        outputs = entrant.run()
        if entrant.trains:
            entrant.differentiate(outputs, outputs)
    return entrant


def compiled(case: Case, function: Callable[..., Any], **options: Any) -> Entrant:
    """`function` of the case's tensors under torch.compile, of these very shapes."""
    return ready(Entrant.peer(case, torch.compile(function, fullgraph=True, dynamic=False), **options))


def ours_compiled(case: Case, backend: str = "torch") -> Entrant:
    """Our op on a backend, inside a compiled graph."""
    case = replace(case, op=torch.compile(_anew(case.op), fullgraph=True, dynamic=False))
    with use_backend(backend):  # the graph keeps it
        return ready(Ours(case.inputs, lambda *_: case.forward(), case=case))


def _anew(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy that Dynamo does not take for the one that it has a graph of, on another backend: it looks at the code."""
    if not isinstance(function, FunctionType):
        return function
    parts = (function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy = FunctionType(function.__code__.replace(co_name=f"{function.__name__}_anew"), *parts)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
