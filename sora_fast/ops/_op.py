"""An op of PyTorch's dispatcher, with its gradient, that costs the host little where it is called eagerly.

`torch.library.custom_op` leads every call through two layers of Python before the kernel's own (9 µs of an op's 35, and
45 with gradients, on a 2 GHz core). Here the dispatcher calls the kernel's Python itself, and where nothing is compiled
the gradient comes from an `autograd.Function` outside of it. Everything that looks at ops (compilers, fake tensors,
modes, functorch, profilers, tensor subclasses) still sees one op of one schema.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import Parameter

# Of what an eager call with gradients may be made; anything else goes through the dispatcher's own autograd.
_PLAIN = frozenset((torch.Tensor, Parameter, list, str, float, int, bool, type(None)))


class Op:
    """One op. Called like the function that it was made from, with positional arguments only.

    registered: the op as the dispatcher has it.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self._name = name
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
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
            return self.registered(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if self._backward is None or not _PLAIN.issuperset(map(type, args)):
                return self.registered(*args)
            return self._function.apply(*args)
        if forward_ad._current_level >= 0:
            return self.registered(*args)
        return self._below_autograd(*args)

    def _below_autograd(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.registered(*args)

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
            output = of._below_autograd(*args)
            of._keep(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            # A list is no tensor to this class, and has no gradient at all.
            return tuple(None if isinstance(grad, list) else grad for grad in of._gradients(ctx, *grads))

    return Function
