"""Who does the work of a case: the op itself on one of its backends, or a peer."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from sora_fast import use_backend

Tensors = tuple[Tensor, ...]


class Absent(Exception):
    """Why a peer does not do the work of a case here."""


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, eq=False)
class Entrant:
    """One that does the work.

    inputs: what it reads and gives gradients of. forward: outputs from `inputs`. pack, unpack: from a tensor of the
    case to one in this entrant's own form, padded for example, and back; they are not timed. trains: whether it has a
    backward pass. within: entered for every call.
    """

    inputs: Tensors
    forward: Callable[..., Any]
    pack: Callable[[Tensor], Tensor] = _as_it_is
    unpack: Callable[[Tensor], Tensor] = _as_it_is
    trains: bool = True
    within: Callable[[], AbstractContextManager[Any]] = nullcontext

    @staticmethod
    def peer(case: Case, function: Callable[..., Any], **options: Any) -> "Entrant":
        """`function` of the case's tensors that have gradients, each in the form that `pack` among `options` makes."""
        pack = options.get("pack", _as_it_is)
        trains = options.get("trains", True)
        inputs = tuple(pack(x.detach()).requires_grad_(trains) for x in case.inputs)
        return Entrant(inputs, function, **options)

    def run(self) -> Tensors:
        """The outputs, as this entrant has them."""
        with self.within(), torch.set_grad_enabled(self.trains):
            result = self.forward(*self.inputs)
        return result if isinstance(result, tuple) else (result,)

    def differentiate(self, outputs: Tensors, gradients: Tensors) -> Tensors:
        """Gradients of the inputs; may be called many times for the same outputs."""
        with self.within():
            return torch.autograd.grad(outputs, self.inputs, gradients, retain_graph=True)


@dataclass(frozen=True, eq=False)
class Ours(Entrant):
    """The case as it is, on a backend."""

    case: Case = field(kw_only=True)

    @staticmethod
    def on(backend: str, case: Case) -> "Ours":
        within = partial(use_backend, backend)
        return Ours(case.inputs, lambda *_: case.forward(), trains=bool(case.inputs), within=within, case=case)

    def differentiate(self, outputs: Tensors, gradients: Tensors) -> Tensors:
        with self.within():
            return self.case.backward(outputs, gradients)
