"""Whether a replaced module computes what the original does: both beside the original in fp64."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from sora_fast.integrations.diffusers.target import Target

# How many times as far from fp64 as the original a replaced module may be: all its tensors together, and each, of which
# a small one is a matter of luck: it rounds at other places, mostly fewer. (24 numbers: 2.2 in one example.)
_TOGETHER, _EACH = 1.05, 2.0
# What passes in any case, as a share of a tensor. fp32: of the last bits, a ratio says nothing. fp16, bf16: what a
# single rounding of the result costs (in the mean of squares, 0.4 of the largest).
_FLOORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-4, torch.bfloat16: 1.5e-3}


@dataclass(frozen=True)
class Comparison:
    """Of one tensor, or of all, over all examples: distances |x − exact| / |exact| of ours and theirs, by 2-norms."""

    name: str
    ours: float
    theirs: float
    times: float
    floor: float

    @property
    def limit(self) -> float:
        return max(self.times * self.theirs, self.floor)

    @property
    def passed(self) -> bool:
        return self.ours <= self.limit  # False for NaN

    def __str__(self) -> str:
        return f"{self.name}: {self.ours:.2e} from fp64, the original {self.theirs:.2e}; at most {self.limit:.2e}"


def compare(module: nn.Module, target: Target, bind: Callable[[nn.Module], None]) -> list[Comparison]:
    """Outputs and all gradients, on the target's examples. bind: replaces what is to be replaced in a copy of `module`.

    Copies are compared, without hooks and in evaluation mode; the module, its gradients and the global random state
    stay as they are.
    """
    theirs, ours, exact = (_bare(module) for _ in range(3))
    bind(ours)
    exact.double()
    distances: dict[str, list[tuple[float, float]]] = {}  # of a tensor, in every example: ours and theirs
    for arguments in target.examples(module, Generator().manual_seed(0)):
        wanted = _results(exact, {name: _widened(value) for name, value in arguments.items()})
        mine, other = (_results(copied, arguments) for copied in (ours, theirs))
        for name, right in wanted.items():
            distances.setdefault(name, []).append((_distance(mine[name], right), _distance(other[name], right)))
    floor = _FLOORS[arguments["hidden_states"].dtype]
    each = [Comparison(name, *_mean_squares(found), _EACH, floor) for name, found in distances.items()]
    everything = [pair for found in distances.values() for pair in found]
    return [*each, Comparison("all tensors", *_mean_squares(everything), _TOGETHER, floor)]


def _mean_squares(pairs: list[tuple[float, float]]) -> Iterator[float]:
    """Of the firsts, and of the seconds."""
    return (math.sqrt(sum(value**2 for value in values) / len(values)) for values in zip(*pairs, strict=True))


def _bare(module: nn.Module) -> nn.Module:
    """A copy that computes, and nothing else: no hooks, no dropout."""
    bare = copy.deepcopy(module).eval().requires_grad_(True)
    for part in bare.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    return bare


def _results(module: nn.Module, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The output, and the gradients of all arguments that are tensors and of all parameters."""
    arguments = {name: _fresh(value) for name, value in arguments.items()}
    leaves = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    leaves |= dict(module.named_parameters())
    with torch.enable_grad(), _Exact():
        output = module(**arguments)
        # As bf16 has it, so that all dtypes are given the same.
        cotangent = torch.randn(output.shape, generator=Generator().manual_seed(1)).bfloat16().to(output)
        gradients = torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True)
    named = {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    return {"the output": output.detach()} | {f"the gradient of {name}": x for name, x in named.items()}


def _fresh(value: Any) -> Any:
    return value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _distance(x: Tensor, exact: Tensor) -> float:
    scale = exact.norm().item()
    error = (x.double() - exact).norm().item()
    return error / scale if scale else error


class _Exact(TorchFunctionMode):
    """diffusers goes through fp32 by `.float()` wherever it wants more than bf16; here fp64 stays what it is."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))
