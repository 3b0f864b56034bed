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
    """Base of frozen dataclasses whose fields are tensors, other bundles, tuples of these, or static Python values."""

    def _map(self: Bundle, fn: Callable[[Tensor], Tensor]) -> Bundle:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: _mapped(value, fn) for name, value in values.items() if _holds_tensors(value)})

    def to(self: Bundle, device: torch.device | str, *, non_blocking: bool = False) -> Bundle:
        """The same bundle with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: Bundle) -> Bundle:
        """The same bundle in page-locked host memory, ready for an asynchronous copy."""
        return self._map(lambda tensor: tensor.pin_memory())

    def check_like(self, name: str, other: "TensorBundle") -> None:
        """`other`, called `name` in messages, has the shapes, devices and static values of this. ValueError."""
        for field in fields(self):
            check_like(f"{name}.{field.name}", getattr(self, field.name), getattr(other, field.name))

    def copy_(self, other: "TensorBundle") -> None:
        """Take over the content of a bundle like this one (see `check_like`) into the memory of this one."""
        for field in fields(self):
            copy_into(getattr(self, field.name), getattr(other, field.name))


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor | TensorBundle | tuple)


def _mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, TensorBundle):
        return value._map(fn)
    if isinstance(value, tuple):
        parts = [_mapped(part, fn) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def check_like(name: str, mine: Any, theirs: Any) -> None:
    """As the method, of any value that a bundle may hold."""
    if isinstance(mine, TensorBundle) and isinstance(theirs, TensorBundle):
        mine.check_like(name, theirs)
        return
    if isinstance(mine, tuple) and isinstance(theirs, tuple) and len(mine) == len(theirs):
        for place, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            check_like(f"{name}[{place}]", one, other)
        return
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        mine, theirs = (f"{list(x.shape)} on {x.device}" for x in (mine, theirs))
    if mine != theirs:
        raise ValueError(f"{name}: {theirs}; it must be {mine}, as it was before")


def copy_into(mine: Any, theirs: Any) -> None:
    """`TensorBundle.copy_`, of any value that a bundle may hold."""
    if isinstance(mine, Tensor | TensorBundle):
        mine.copy_(theirs)
    elif isinstance(mine, tuple):
        for one, other in zip(mine, theirs, strict=True):
            copy_into(one, other)
