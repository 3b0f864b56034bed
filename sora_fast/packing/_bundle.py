"""What every packed data structure shares: it is a frozen bundle of tensors that move together."""

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import count
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

Bundle = TypeVar("Bundle", bound="TensorBundle")


def may_read(tensor: Tensor) -> bool:
    """True if looking at the values costs nothing: on a CPU, outside a compiled graph. Anywhere else it would wait."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def likeness(bundle: "TensorBundle") -> int:
    """A number that bundles share, in this process, whose tensors have the same shapes, dtypes and devices and whose
    static values are equal. Quick for a bundle that was seen before."""
    known = _likeness.get(bundle)
    if known is None:
        if len(_numbers) >= _MOST:
            _numbers.clear()
        known = _likeness[bundle] = _numbers.setdefault(_described(bundle), next(_unused))
    return known


_likeness: "WeakKeyDictionary[TensorBundle, int]" = WeakKeyDictionary()
_numbers: dict[tuple[Any, ...], int] = {}
_unused = count()  # no number twice, whichever threads ask at once
_MOST = 4096


def _described(bundle: "TensorBundle") -> tuple[Any, ...]:
    described: list[Any] = [type(bundle)]
    for field in fields(bundle):
        value = getattr(bundle, field.name)
        if isinstance(value, Tensor):
            value = (tuple(value.shape), value.dtype, value.device)
        elif isinstance(value, TensorBundle):
            value = likeness(value)
        described.append(value)
    return tuple(described)


class TensorBundle:
    """Base of frozen dataclasses whose fields are tensors, other bundles, or static Python values."""

    def _map(self: Bundle, fn: Callable[[Tensor], Tensor]) -> Bundle:
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = fn(value)
            elif isinstance(value, TensorBundle):
                changed[field.name] = value._map(fn)
        return replace(self, **changed)

    def to(self: Bundle, device: torch.device | str, *, non_blocking: bool = False) -> Bundle:
        """The same bundle with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: Bundle) -> Bundle:
        """The same bundle in page-locked host memory, ready for an asynchronous copy."""
        return self._map(lambda tensor: tensor.pin_memory())

    def check_like(self, name: str, other: "TensorBundle") -> None:
        """`other`, called `name` in messages, has the shapes, devices and static values of this. ValueError."""
        for field in fields(self):
            mine, theirs = (getattr(bundle, field.name) for bundle in (self, other))
            if isinstance(mine, TensorBundle):
                mine.check_like(f"{name}.{field.name}", theirs)
                continue
            if isinstance(mine, Tensor):
                mine, theirs = (f"{list(x.shape)} on {x.device}" for x in (mine, theirs))
            if mine != theirs:
                raise ValueError(f"{name}.{field.name}: {theirs}; it must be {mine}, as it was before")

    def copy_(self, other: "TensorBundle") -> None:
        """Take over the content of a bundle like this one (see `check_like`) into the memory of this one."""
        for field in fields(self):
            mine, theirs = (getattr(bundle, field.name) for bundle in (self, other))
            if isinstance(mine, Tensor | TensorBundle):
                mine.copy_(theirs)
