"""What every packed data structure shares: it is a frozen bundle of tensors that move together."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

Bundle = TypeVar("Bundle", bound="TensorBundle")


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
