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
