"""An op of PyTorch's dispatcher, with its gradient, that costs the host little where it is called eagerly.

`torch.library.custom_op` takes 9 to 20 µs a call beside the kernel's own, and 50 with gradients, of the 35 that a small
op has. Here an eager call of plain tensors that nobody watches does not go through the dispatcher, whose part is 3 to
17 µs (lists are dear), and its gradient comes from an `autograd.Function`. Everything that looks at ops (compilers,
tracers, modes, functorch, profilers, tensor subclasses) sees one op of one schema, as ever; observers of single
functions (torch.profiler.ExecutionTraceObserver) see the kernels alone.
"""

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_TENSORS = frozenset((Tensor, Parameter))
_NUMBERS = frozenset((str, float, int, bool, torch.dtype, type(None)))
_LISTED = _TENSORS | _NUMBERS
# Looked up once, since they are asked in every call. For every tensor: whether it stands for a batch of others
# (torch.autograd.grad's is_grads_batched), or for one that is traced.
_is_batch, _is_traced = torch._C._functorch.is_legacy_batchedtensor, torch._is_functional_tensor
_num_modes, _has_function_mode = torch._C._len_torch_dispatch_stack, torch._C._is_torch_function_mode_enabled
_transform, _is_profiling, _is_tracing = (
    torch._C._functorch.peek_interpreter_stack,
    torch.autograd._profiler_enabled,
    torch._C._is_tracing,
)


class Op:
    """One op. Called like the function that it was made from, with positional arguments only.

    registered: the op as the dispatcher has it.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self._name, self._run = name, run
        self._save: Callable[..., None] | None = None
        self._backward: Callable[..., Any] | None = None
        tags = (torch.Tag.pt2_compliant_tag,)
        torch.library.define(name, torch.library.infer_schema(run, mutates_args=()), tags=tags)
        torch.library.impl(name, "default", _untraced(run))
        torch.library.register_autograd(name, self._gradients, setup_context=self._keep)
        namespace, own = name.split("::")
        self.registered = getattr(getattr(torch.ops, namespace), own).default
        self._function = _function(self)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """What the results look like, for fake and meta tensors. Can be a decorator."""
        return torch.library.register_fake(self._name, fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Both as `torch.library.register_autograd` takes them. The gradient of a list is a list of None."""
        self._backward, self._save = backward, setup_context

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched() or not _are_plain(args):
            return self.registered(*args)
        if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*args):
            return self._run(*args)
        return self.registered(*args) if self._backward is None else self._function.apply(*args)

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self._save is not None:
            self._save(ctx, inputs, output)

    def _gradients(self, ctx: Any, *grads: Any) -> Any:
        if self._backward is None:
            raise RuntimeError(f"{self._name} has no derivative: it is the derivative of another op")
        return self._backward(ctx, *grads)


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Makes an `Op` of a function with type hints, from which its schema follows; it changes none of its arguments."""
    return lambda run: Op(name, run)


@cache
def kernels(name: str) -> ModuleType:
    """A module of sora_fast.kernels, loaded where it is first needed: Triton may be missing. (An import statement costs
    1 µs, every time.)"""
    return import_module(f"sora_fast.kernels.{name}")


def _is_watched() -> bool:
    """Whether anybody looks at the ops that this thread calls, or makes other ops of them."""
    return _num_modes() > 0 or _has_function_mode() or _transform() is not None or _is_profiling() or _is_tracing()


def _are_plain(args: tuple[Any, ...]) -> bool:
    """Whether the memory of all tensors is what they say, so that the dispatcher would do nothing about them."""
    for arg in args:
        kind = type(arg)
        if kind in _TENSORS:
            if arg.is_meta or arg.is_neg() or arg._is_zerotensor() or _is_batch(arg) or _is_traced(arg):
                return False
        elif kind is list:
            if not _LISTED.issuperset(map(type, arg)):
                return False
        elif kind not in _NUMBERS:
            return False
    return True


def _untraced(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, which Dynamo must not trace where it comes here from a frame that it has given up."""
    disabled = torch._disable_dynamo(run)

    def call(*args: Any) -> Any:
        # It takes 2 µs, and the first time an import of over a second.
        return disabled(*args) if "torch._dynamo" in sys.modules else run(*args)

    return call


def _function(of: Op) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = of._run(*args)
            of._keep(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            # A list is no tensor to this class, and has no gradient at all.
            return tuple(None if isinstance(grad, list) else grad for grad in of._gradients(ctx, *grads))

    Function.__name__ = Function.__qualname__ = of._name.rpartition(":")[2]  # which PyTorch's messages name
    return Function
