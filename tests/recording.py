"""A stand-in for CUDA's capture: what a call launches is kept, and a replay launches the same again."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Values that the host asks for, and sizes that depend on them.
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave.Tensor")


class Tape(TorchDispatchMode):
    """Every op of a call, with the very tensors and numbers that it had.

    As in a capture nothing is computed: what the call wrote outside itself is put back, and what it made is spoiled.
    outside: tensors that it read or wrote, and had not made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[Tensor] = []
        self._ops: list[tuple[Any, Any, Any, Any]] = []
        self._made: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        assert not name.startswith(_READS), f"{name}: the host reads a tensor"
        assert name != "lift_fresh", "a tensor is made of numbers on the host"
        for tensor in _tensors((args, kwargs)):
            self._note(tensor)
        outputs = func(*args, **(kwargs or {}))
        for tensor in _tensors(outputs):
            self._made.setdefault(_memory(tensor), tensor)
        if not _is_view(func):
            self._ops.append((func, args, kwargs or {}, outputs))
        return outputs

    def _note(self, tensor: Tensor) -> None:
        place = _memory(tensor)
        if place not in self._made and place not in self._before:
            self._before[place] = tensor, tensor.detach().clone()
            self.outside.append(tensor)

    @torch.no_grad()
    def spoil(self) -> None:
        """At the end of the capture."""
        for tensor, value in self._before.values():
            tensor.copy_(value)
        for place, tensor in self._made.items():
            if place not in self._before and tensor.is_floating_point():
                tensor.fill_(float("nan"))

    @torch.no_grad()
    def replay(self) -> None:
        """All ops again, where they were."""
        for func, args, kwargs, outputs in self._ops:
            if "empty" in func.name():
                continue
            made = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for mine, new in zip(_tensors(outputs), _tensors(made), strict=True):
                    mine.copy_(new)


class FakeRecorder:
    """Stands in for `graphs.CudaRecorder`. tapes: of all captures."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def warm_up(self, call: Callable[[], Any]) -> Any:
        return call()

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with _nobody_may_read(), Tape() as tape:
            outputs = call()
        tape.spoil()
        self.tapes.append(tape)
        return tape.replay, outputs


@contextlib.contextmanager
def _nobody_may_read() -> Iterator[None]:
    """As on a GPU: values are not looked at where that would cost something."""
    with contextlib.ExitStack() as stack:
        for module in [module for module in sys.modules.values() if hasattr(module, "may_read")]:
            stack.enter_context(mock.patch.object(module, "may_read", lambda tensor: False))
        yield


def places(tensors: Iterable[Tensor]) -> set[int]:
    """Where in memory they lie, whichever part of it they show."""
    return {_memory(tensor) for tensor in tensors}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_view(func: Any) -> bool:
    return not func._schema.is_mutable and any(result.alias_info for result in func._schema.returns)
