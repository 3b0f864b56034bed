"""Where an eager call goes past the dispatcher, and where it must not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sora_fast.ops._op import op


@op("sora_fast_test::power")
def _power(x: Tensor, others: list[Tensor], exponent: float) -> tuple[Tensor, Tensor]:
    return x**exponent, torch.full_like(x, len(others))


@op("sora_fast_test::power_backward")
def _power_backward(grad: Tensor, x: Tensor, exponent: float) -> Tensor:
    return grad * exponent * x ** (exponent - 1)


@_power.register_fake
def _(x: Tensor, others: list[Tensor], exponent: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@_power_backward.register_fake
def _(grad: Tensor, x: Tensor, exponent: float) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, others, ctx.exponent = inputs
    ctx.save_for_backward(x, *others)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, *others = ctx.saved_tensors
    return _power_backward(grad, x, ctx.exponent), [None] * len(others), None


_power.register_autograd(_backward, setup_context=_save)
OTHERS = [torch.ones(2), torch.ones(3)]


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every call that goes through the dispatcher."""
    calls: list[int] = []
    registered = _power.registered
    monkeypatch.setattr(_power, "registered", lambda *args: calls.append(1) or registered(*args))
    return calls


def test_plain_calls_go_past_the_dispatcher(dispatched: list[int]) -> None:
    x = torch.randn(4)
    power, count = _power(x, OTHERS, 3.0)
    torch.testing.assert_close(power, x**3)
    assert count.tolist() == [2.0] * 4
    with torch.no_grad():
        assert not _power(x.requires_grad_(), OTHERS, 3.0)[0].requires_grad
    assert not dispatched


def test_gradients_are_those_of_the_dispatcher_s_op(dispatched: list[int]) -> None:
    x = torch.randn(4, requires_grad=True)
    power, count = _power(x, OTHERS, 3.0)
    assert power.requires_grad and not count.requires_grad and not dispatched
    (own,) = torch.autograd.grad(power.sum(), x)
    (others,) = torch.autograd.grad(_power.registered(x, OTHERS, 3.0)[0].sum(), x)
    assert torch.equal(own, others)
    torch.testing.assert_close(own, 3 * x.detach() ** 2)


def test_a_derivative_has_none() -> None:
    x = torch.randn(4, requires_grad=True)
    (grad,) = torch.autograd.grad(_power(x, OTHERS, 3.0)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="sora_fast_test::power_backward has no derivative"):
        grad.sum().backward()


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradients", [False, True])
def test_modes_and_profilers_see_the_op(gradients: bool) -> None:
    x = torch.randn(4, requires_grad=gradients)
    with _Seen() as seen:
        _power(x, OTHERS, 2.0)
    assert seen.names == ["sora_fast_test.power.default"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _power(x, OTHERS, 2.0)
    assert "sora_fast_test::power" in [event.key for event in profile.key_averages()]


def test_batches_of_gradients_go_through_the_dispatcher() -> None:
    from sora_fast.ops import adaln

    x, table = torch.randn(4, 8, requires_grad=True), torch.randn(2, 2, 8)
    index = torch.tensor([0, 1, 0, -1], dtype=torch.int32)
    out = adaln(x, *table, index, backend="triton")
    slopes = torch.randn(3, *out.shape)
    (batch,) = torch.autograd.grad(out, x, slopes, is_grads_batched=True, retain_graph=True)
    for one, slope in zip(batch, slopes, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(out, x, slope, retain_graph=True)[0])


class _Sub(Tensor):
    pass


@pytest.mark.parametrize(
    "of",
    [
        lambda x: torch.complex(x, x).conj().imag,  # its memory holds the negative
        lambda x: x.as_subclass(_Sub),
        lambda x: x.to("meta"),
    ],
    ids=["negative", "subclass", "meta"],
)
def test_tensors_that_are_not_what_their_memory_holds(of: Callable[[Tensor], Tensor], dispatched: list[int]) -> None:
    x = of(torch.randn(4))
    power, _ = _power(x, OTHERS, 3.0)
    assert dispatched and power.device == x.device
    if not x.is_meta:
        torch.testing.assert_close(power.as_subclass(Tensor), (x**3).as_subclass(Tensor))


def test_what_comes_in_a_list_is_looked_at_too(dispatched: list[int]) -> None:
    _power(torch.randn(4), [torch.ones(2).as_subclass(_Sub)], 3.0)
    assert dispatched


def test_functorch_is_refused_as_of_any_custom_op() -> None:
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: _power(x, OTHERS, 3.0)[0].sum())(torch.randn(4))


def test_a_compiled_graph_holds_the_op() -> None:
    targets: list[Any] = []

    def look(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        targets.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return module

    x = torch.randn(4)
    compiled = torch.compile(lambda x: _power(x, OTHERS, 3.0)[0], backend=look, fullgraph=True)
    torch.testing.assert_close(compiled(x), x**3)
    assert torch.ops.sora_fast_test.power.default in targets


def test_opcheck() -> None:
    x = torch.randn(4, requires_grad=True)
    torch.library.opcheck(_power.registered, (x, OTHERS, 3.0))
    torch.library.opcheck(_power_backward.registered, (torch.randn(4), x.detach(), 3.0))
