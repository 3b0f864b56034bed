"""mlp_activation: the bias and the nonlinearity between the two products of an MLP."""

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.ops._checks import FLOAT_DTYPES, check_device, check_dtype, check_shape, once
from sora_fast.ops._dispatch import choose
from sora_fast.ops._modulation import offered
from sora_fast.ops._op import kernels, op

ACTIVATIONS = ("gelu", "gelu_erf", "swiglu")
GATES = ("first", "second")


def mlp_activation(
    x: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    gate: str = "first",
    backend: str | None = None,
) -> Tensor:
    """The activation of x + bias.

    x: [N, H], bf16, fp16 or fp32 (fp64 on the torch backend), any strides: the product of the MLP's first layer, with
        its bias or without. It is all that the backward pass keeps of the two (on the torch backend not compiled, the
        SiLU of "swiglu" too).
    bias: [H], of any such dtype, or None. Its gradient is summed in the same pass, in a fixed order.
    activation: "gelu": tanh-GELU, [N, H]. "gelu_erf": the exact one, x · Φ(x) (arXiv:1606.08415). "swiglu": SiLU of the
        first half of the columns times the second, [N, H / 2] (Shazeer, arXiv:2002.05202).
    gate: "second": "swiglu" takes the SiLU of the second half, as diffusers has its halves.

    Returns the dtype of x; computed in fp32, by the torch backend in PyTorch's own steps, each rounded to x's dtype.
    Raises TypeError or ValueError for arguments that do not fit together.
    """
    _check(x, bias, activation, gate)
    if backend_for(x, backend) == "torch":
        return _torch(x if bias is None else x + bias.to(x.dtype), activation, gate)
    return _mlp_activation(x, bias, activation, gate)


def backend_for(x: Tensor, backend: str | None = None) -> str:
    """Which backend runs here. In a kernel the bias costs nothing, and its gradient no pass of its own; in "torch" a
    matrix product adds it for less."""
    return choose("mlp_activation", backend, x.device, offered(x), x.dtype)


def _torch(x: Tensor, activation: str, gate: str) -> Tensor:
    if activation == "swiglu":
        first, second = x.chunk(2, dim=1)
        return F.silu(first) * second if gate == "first" else F.silu(second) * first
    if activation == "gelu_erf":
        return F.gelu(x)
    if not torch.compiler.is_compiling() or x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    # (1 + tanh u) / 2 = sigmoid 2u. Inductor's exponential is quick on a CPU, its hyperbolic tangent is not: forward
    # and backward over 1,024 × 512 on one core take 1.7 ms in place of 3.9.
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


@op("sora_fast::mlp_activation")
def _mlp_activation(x: Tensor, bias: Tensor | None, activation: str, gate: str) -> Tensor:
    return kernels("mlp_activation").mlp_activation_forward(x, bias, _form(activation, gate))


@op("sora_fast::mlp_activation_backward")
def _mlp_activation_backward(
    d_out: Tensor, x: Tensor, bias: Tensor | None, activation: str, gate: str, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    backward = kernels("mlp_activation").mlp_activation_backward
    return backward(d_out, x, bias, _form(activation, gate), bias_gradient=bias_gradient)


@cache
def _form(activation: str, gate: str) -> Any:
    return kernels("mlp_activation").Form(activation == "swiglu", erf=activation == "gelu_erf", last=gate == "second")


@_mlp_activation.register_fake
def _(x: Tensor, bias: Tensor | None, activation: str, gate: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // (1 + (activation == "swiglu")))


@_mlp_activation_backward.register_fake
def _(d_out: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[1] * rest[-1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, *ctx.form = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    needs_bias = ctx.needs_input_grad[1]
    d_x, d_bias = _mlp_activation_backward(d_out, x, bias, *ctx.form, needs_bias)
    return d_x, d_bias.to(bias.dtype) if needs_bias else None, None, None


_mlp_activation.register_autograd(_backward, setup_context=_save)


@once
def _check(x: Tensor, bias: Tensor | None, activation: str, gate: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: {activation!r}; it must be one of {ACTIVATIONS}")
    if gate not in GATES:
        raise ValueError(f"gate: {gate!r}; it must be one of {GATES}")
    if gate != "first" and activation != "swiglu":
        raise ValueError(f"gate: {gate!r}, but {activation} has no gate; leave it out")
    check_shape("x", x, ["N", "H"])
    check_dtype("x", x, FLOAT_DTYPES)
    if x.shape[1] == 0 or (activation == "swiglu" and x.shape[1] % 2):
        raise ValueError(f"x: {x.shape[1]} columns; {activation} needs {'an even number' if x.shape[1] else 'some'}")
    if bias is not None:
        check_shape("bias", bias, x.shape[1:])
        check_dtype("bias", bias, FLOAT_DTYPES)
        check_device("bias", bias, "x", x.device)
