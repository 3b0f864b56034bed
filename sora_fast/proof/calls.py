"""Call: an op with its arguments, which can be run elsewhere, or in fp64."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from sora_fast.ops import FactorisedPosition, adaln, adaln_pair
from sora_fast.packing import RaggedLatents
from sora_fast.packing._bundle import TensorBundle


def form_of(op: Callable[..., Any], *absent: int, **options: Any) -> Callable[..., Any]:
    """`op` of fewer arguments: None stands at these places, and `options` are set. `absent`, `options`: kept on it."""

    @wraps(op)
    def form(*args: Any, **more: Any) -> Any:
        given = list(args)
        for place in absent:
            given.insert(place, None)
        return op(*given, **options, **more)

    form.absent, form.options = absent, options
    return form


@wraps(adaln)  # whose name it has: it is a form of it
def adaln_pair_of(x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    """`adaln_pair` of four tables, one by one."""
    shift, scale, shift_second, scale_second, index = args
    return adaln_pair(x, (shift, scale), (shift_second, scale_second), index, **options)


@dataclass(frozen=True, eq=False)
class Call:
    """One call `op(*args, **options)`; gradients are asked for every floating-point tensor among `args`, and for the
    pixels of ragged latents and the tables of positions that require one. label: tells it from the op's others.
    """

    op: Callable[..., Any]
    label: str
    args: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for argument in self.args:
            if isinstance(argument, Tensor) and argument.is_floating_point():
                argument.requires_grad_()

    @property
    def name(self) -> str:
        return f"{self.op.__name__}[{self.label}]"

    @property
    def device(self) -> torch.device:
        return next(argument.device for argument in (*self.inputs, *self.args) if hasattr(argument, "device"))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that gradients are asked for."""
        tensors = [tensor for argument in self.args for tensor in _held(argument)]
        return tuple(t for t in tensors if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad)

    def exact(self) -> "Call":
        """The same work on the same numbers in fp64."""
        return replace(self, args=tuple(_mapped(argument, _widened) for argument in self.args))

    def to(self, device: torch.device) -> "Call":
        """The same work on the same numbers elsewhere."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

        args = tuple(_mapped(argument, moved) for argument in self.args)
        options = {name: _mapped(option, moved) for name, option in self.options.items()}
        return replace(self, args=args, options=options)

    def on(self, backend: str) -> "Call":
        """The same work on a backend."""
        return replace(self, options={**self.options, "backend": backend})

    def forward(self) -> tuple[Tensor, ...]:
        """The outputs."""
        result = self.op(*self.args, **self.options)
        if isinstance(result, RaggedLatents):
            return (result.flat,)
        return result if isinstance(result, tuple) else (result,)

    def backward(self, outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of the inputs; may be called many times for the same outputs."""
        if not self.inputs:
            return ()
        return torch.autograd.grad(outputs, self.inputs, gradients, retain_graph=True)

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward; the outputs stand in for their gradients."""
        outputs = self.forward()
        return self.backward(outputs, outputs)


def _held(argument: Any) -> tuple[Any, ...]:
    if isinstance(argument, RaggedLatents):
        return (argument.flat,)
    return argument.tables if isinstance(argument, FactorisedPosition) else (argument,)


def _mapped(argument: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(argument, Tensor):
        return change(argument)
    if isinstance(argument, TensorBundle):
        return argument._map(change)
    if isinstance(argument, FactorisedPosition):
        return FactorisedPosition(*(None if table is None else change(table) for table in argument.tables))
    return argument


def _widened(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
