from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sora_fast.ops.mlp_activation import _mlp_activation, _mlp_activation_backward, mlp_activation
from sora_fast.proof.rule import poisoned_scratch
from tests.helpers import assert_within_rule, examples, far_apart
from tests.modulated import no_recompilation
from tests.ragged import DTYPES

BACKENDS = ("torch", "triton")
ACTIVATIONS = ("gelu", "gelu_erf", "swiglu", "swiglu second")  # the last: gated by the second half


@dataclass(frozen=True)
class Case:
    """[tokens, columns]; scale: of the numbers."""

    tokens: int = 45
    columns: int = 70
    activation: str = "gelu"
    bias: bool = True
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    layout: str = "sliced"
    seed: int = 0

    def tensors(self) -> tuple[list[Tensor], Tensor]:
        """Leaves, and the gradient of the output; laid out as the case says."""
        torch.manual_seed(self.seed)
        width = self.columns // 2 if self.activation.startswith("swiglu") else self.columns
        x, d_out = (self._laid_out(torch.randn(self.tokens, 2 * c))[:, :c] for c in (self.columns, width))
        # A bias in fp32 beside half-precision numbers, as autocast has it, every other seed.
        bias = torch.randn(2 * self.columns)[::2].to(self.dtype if self.seed % 2 else torch.float32)
        return [(x * self.scale).to(self.dtype), bias][: 1 + self.bias], d_out.to(self.dtype)

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.t().contiguous().t() if self.layout == "permuted" else x


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        tokens=draw(st.sampled_from([0, 1, 2, 31, 130])),
        columns=draw(st.sampled_from([2, 6, 64, 130, 530])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        scale=draw(st.sampled_from([1.0, 30.0])),
        layout=draw(st.sampled_from(["sliced", "permuted"])),
        seed=draw(st.integers(0, 99)),
    )


def formula(activation: str) -> Any:
    """As plain PyTorch has it."""

    def run(x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x if bias is None else x + bias.to(x.dtype)
        if activation.startswith("gelu"):
            return F.gelu(x, approximate="tanh" if activation == "gelu" else "none")
        first, second = x.chunk(2, dim=1)
        return F.silu(first) * second if activation == "swiglu" else first * F.silu(second)

    return run


def options(activation: str) -> dict[str, str]:
    """As the op takes it."""
    name, _, gate = activation.partition(" ")
    return {"activation": name, **({"gate": gate} if gate else {})}


def run(op: Any, leaves: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """The output, then the gradient of every leaf."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = op(*leaves)
    return [out, *torch.autograd.grad(out, leaves, d_out)]


def check(case: Case, backend: str, device: torch.device) -> None:
    leaves, d_out = case.tensors()
    given = [leaf.to(device) for leaf in leaves]
    with poisoned_scratch():
        actual = run(
            lambda x, bias=None: mlp_activation(x, bias, **options(case.activation), backend=backend),
            given,
            d_out.to(device),
        )
    plain = run(formula(case.activation), leaves, d_out)
    oracle = run(formula(case.activation), [leaf.double() for leaf in leaves], d_out.double())
    for name, a, p, o in zip(("out", "x", "bias"), actual, plain, oracle, strict=False):
        assert_within_rule(a, p, o, name=f"{name} of {case}")


@pytest.mark.parametrize("backend", BACKENDS)
@examples(15)
@given(case=cases())
def test_random_cases_match_the_oracle(case: Case, backend: str, device: torch.device) -> None:
    check(case, backend, device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_of_every_size(dtype: torch.dtype, activation: str, device: torch.device) -> None:
    """Where the gate is 0 or 1, and where the cube of the number is none any more, nothing is infinite or NaN."""
    largest = torch.finfo(dtype).max
    sizes = [0.0, 1e-7, 0.1, 3.0, 9.0, 15.9, 16.1, 88.0, 1e4, largest]
    x = torch.tensor([[sign * size for size in sizes for sign in (1, -1)]], dtype=dtype, device=device)
    halves = {"swiglu": [x, torch.ones_like(x)], "swiglu second": [torch.ones_like(x), x]}
    x = torch.cat(halves.get(activation, [x]), dim=1)
    out, d_x = run(
        lambda x: mlp_activation(x, None, **options(activation), backend="triton"), [x], torch.ones_like(x[:, :20])
    )
    exact, d_exact = run(formula(activation), [x.double().cpu()], torch.ones(1, 20, dtype=torch.float64))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu().double(), exact, rtol=tolerance, atol=1e-6)
    d_exact = d_exact.clamp(-largest, largest).nan_to_num(0)
    columns = slice(-20, None) if activation == "swiglu second" else slice(20)
    torch.testing.assert_close(d_x.cpu().double()[:, columns], d_exact[:, columns], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bias_of_a_stride_beyond_int32(activation: str, device: torch.device) -> None:
    (x, bias), d_out = Case(tokens=3, columns=6, activation=activation).tensors()
    x, bias, d_out = (tensor.to(device) for tensor in (x, bias, d_out))
    results = [
        run(lambda x: mlp_activation(x, b, **options(activation), backend="triton"), [x], d_out)  # noqa: B023
        for b in (bias, far_apart(bias, 0))
    ]
    assert all(torch.equal(near, far) for near, far in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_repeats_to_the_bit(activation: str, device: torch.device) -> None:
    leaves, d_out = Case(tokens=140, columns=10, activation=activation).tensors()
    leaves = [leaf.to(device) for leaf in leaves]
    runs = [
        run(lambda *t: mlp_activation(*t, **options(activation), backend="triton"), leaves, d_out.to(device))
        for _ in "ab"
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str) -> None:
    leaves, _ = Case(tokens=3, columns=8, activation=activation).tensors()
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *t: mlp_activation(*t, **options(activation), backend="torch"), leaves)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation: str, bias: bool, device: torch.device) -> None:
    leaves, d_out = Case(tokens=4, columns=6, activation=activation, bias=bias, layout="permuted").tensors()
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves] + [None] * (not bias)
    form = (options(activation)["activation"], options(activation).get("gate", "first"))
    torch.library.opcheck(_mlp_activation.registered, (*leaves, *form))
    leaves = [leaf if leaf is None else leaf.detach() for leaf in leaves]
    torch.library.opcheck(_mlp_activation_backward.registered, (d_out.to(device), *leaves, *form, bias))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles(backend: str, activation: str, device: torch.device) -> None:
    def call(*tensors: Tensor) -> Tensor:
        return mlp_activation(*tensors, **options(activation), backend=backend)

    with no_recompilation():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for seed in range(2):
            leaves, d_out = Case(tokens=20, activation=activation, seed=2 * seed).tensors()
            leaves, d_out = [leaf.to(device) for leaf in leaves], d_out.to(device)
            for actual, expected in zip(run(compiled, leaves, d_out), run(call, leaves, d_out), strict=True):
                torch.testing.assert_close(actual, expected)


def test_a_bias_that_wants_no_gradient_costs_no_reduction(device: torch.device) -> None:
    from sora_fast.kernels._launch import recording

    (x, bias), d_out = Case().tensors()
    x, bias, d_out = x.to(device).requires_grad_(), bias.to(device), d_out.to(device)
    out = mlp_activation(x, bias, backend="triton")
    with recording((9, 0)) as recorder:
        torch.autograd.grad(out, x, d_out)
    assert [kernel.fn.__name__ for kernel, *_ in recorder.launches] == ["mlp_activation_backward_kernel"]


X, BIAS = torch.zeros(5, 6), torch.zeros(6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, BIAS, "relu"), ValueError, "activation: 'relu'; it must be one of"),
        ((X[:, 1:], BIAS[1:], "swiglu"), ValueError, "x: 5 columns; swiglu needs an even number"),
        ((X[:, :0], BIAS[:0]), ValueError, "x: 0 columns; gelu needs some"),
        ((X[0], BIAS), ValueError, r"x: shape \(6,\); it must be \[N, H\]"),
        ((X.int(), BIAS), TypeError, "x: int32"),
        ((X, BIAS[1:]), ValueError, r"bias: shape \(5,\); it must be \[6\]"),
        ((X, BIAS.int()), TypeError, "bias: int32"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mlp_activation(*arguments)


@pytest.mark.parametrize(
    ("activation", "gate", "message"),
    [
        ("swiglu", "last", "gate: 'last'; it must be one of"),
        ("gelu_erf", "second", "gate: 'second', but gelu_erf has no gate"),
    ],
)
def test_a_bad_gate_is_named(activation: str, gate: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlp_activation(X, None, activation, gate=gate)


def test_the_other_half_gates_the_same_numbers() -> None:
    x = torch.randn(5, 6)
    first, second = x.chunk(2, dim=1)
    swapped = mlp_activation(torch.cat([second, first], dim=1), None, "swiglu", gate="second")
    assert torch.equal(swapped, mlp_activation(x, None, "swiglu"))
