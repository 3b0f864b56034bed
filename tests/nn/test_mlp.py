import gc

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from sora_fast import use_backend
from sora_fast.nn.mlp import Mlp, SwiGLU
from tests.modulated import no_recompilation


def test_swiglu_is_its_formula_with_the_parameters_of_the_mlp() -> None:
    torch.manual_seed(0)
    module, x = SwiGLU(48, 192), torch.randn(5, 48)
    gate, value = module.fc1(x).chunk(2, dim=1)
    torch.testing.assert_close(module(x), module.fc2(gate * torch.sigmoid(gate) * value))

    def size(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert abs(size(module) / size(Mlp(48, 192)) - 1) < 0.02


def test_mlp_uses_the_tanh_form_of_gelu() -> None:
    torch.manual_seed(0)
    module, x = Mlp(16, 64), torch.randn(5, 16)
    hidden = module.fc1(x)
    cubic = torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3))
    torch.testing.assert_close(module(x), module.fc2(0.5 * hidden * (1 + cubic)))


def test_the_compiled_form_is_the_same_function() -> None:
    """On a CPU the compiled one says the hyperbolic tangent in other words."""
    module, x = Mlp(16, 64).double(), torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, result = module(x), compiled(x)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, gradient)[0] for y in (result, expected)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", [Mlp, SwiGLU])
def test_recomputed_it_keeps_less_and_gives_the_same(kind: type[Mlp], backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    module, x = kind(16, 48).to(device), torch.randn(33, 16, device=device, requires_grad=True)
    kept, results = [], []
    module.fc2.register_forward_pre_hook(lambda _, inputs: kept.append(StorageWeakRef(inputs[0].untyped_storage())))
    for module.recompute in (False, True):
        with use_backend(backend):
            out = module(x)
            gc.collect()  # the interpreter leaves cycles
            alive = not kept[-1].expired()
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
        assert alive is not module.recompute, "whether what goes into fc2 waits for the backward pass"
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for actual, expected in zip(results[0], _plain(module, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def _plain(module: Mlp, x: torch.Tensor) -> list[torch.Tensor]:
    hidden = F.linear(x, module.fc1.weight, module.fc1.bias)
    if isinstance(module, SwiGLU):
        gate, value = hidden.chunk(2, dim=1)
        hidden = F.silu(gate) * value
    else:
        hidden = F.gelu(hidden, approximate="tanh")
    out = F.linear(hidden, module.fc2.weight, module.fc2.bias)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_replaces_or_hooks_a_linear_layer_is_called(backend: str, device: torch.device) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    x = torch.randn(5, 16, device=device)
    module = Mlp(16, 64).to(device)
    expected = module.fc2(F.gelu(2 * module.fc1(x), approximate="tanh"))
    doubled = Doubled(16, 64).to(device)
    doubled.load_state_dict(module.fc1.state_dict())
    hooked = Mlp(16, 64).to(device)
    hooked.load_state_dict(module.state_dict())
    hooked.fc1.register_forward_hook(lambda _, inputs, output: 2 * output)
    patched = Mlp(16, 64).to(device)
    patched.load_state_dict(module.state_dict())
    original = patched.fc1.forward
    patched.fc1.forward = lambda x: 2 * original(x)
    module.fc1 = doubled
    with use_backend(backend):
        torch.testing.assert_close(module(x), expected)
        torch.testing.assert_close(hooked(x), expected)
        torch.testing.assert_close(patched(x), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_hooks_of_a_linear_layer_are_called(backend: str, device: torch.device) -> None:
    module, called = Mlp(16, 64).to(device), []
    module.fc1.register_full_backward_hook(lambda *_: called.append("hook"))
    module.fc1.register_full_backward_pre_hook(lambda *_: called.append("pre-hook"))
    with use_backend(backend):
        module(torch.randn(5, 16, device=device, requires_grad=True)).sum().backward()
    assert sorted(called) == ["hook", "pre-hook"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_recomputed_it_compiles_in_one_graph(backend: str, device: torch.device) -> None:
    module, x = Mlp(16, 64, recompute=True).to(device), torch.randn(5, 16, device=device, requires_grad=True)
    with use_backend(backend), no_recompilation():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        results = [torch.autograd.grad(run(x).square().sum(), [x, *module.parameters()]) for run in (compiled, module)]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_state_dicts_are_plain() -> None:
    for module, width in ((Mlp(6, 24), 24), (SwiGLU(6, 24), 32)):
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        hidden = 24 if width == 24 else 16
        assert shapes == {
            "fc1.weight": (width, 6),
            "fc1.bias": (width,),
            "fc2.weight": (6, hidden),
            "fc2.bias": (6,),
        }
