import torch

from sora_fast.nn.mlp import Mlp, SwiGLU


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
