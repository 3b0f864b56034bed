"""torch.compile as it is measured: whole graphs, and a backward pass that may run many times."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch._functorch import config as functorch

from benchmarks.cases import Case
from benchmarks.entrants import Entrant, Ours
from sora_fast import use_backend


def keep_buffers() -> AbstractContextManager[Any]:
    """Inside, a compiled backward pass leaves what it reads as it was, so that the next round finds it."""
    return functorch.patch(donated_buffer=False)


def compiled(case: Case, function: Callable[..., Any], **options: Any) -> Entrant:
    """`function` of the case's tensors under torch.compile, of these very shapes."""
    whole = torch.compile(function, fullgraph=True, dynamic=False)
    return Entrant.peer(case, whole, within=keep_buffers, **options)


def ours_compiled(case: Case) -> Entrant:
    """Our op on its torch backend, inside a compiled graph."""
    case = replace(case, op=torch.compile(case.op, fullgraph=True, dynamic=False))
    return Ours(case.inputs, lambda *_: case.forward(), within=_plain, case=case)


@contextmanager
def _plain() -> Iterator[None]:
    with use_backend("torch"), keep_buffers():
        yield
