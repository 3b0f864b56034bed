"""The two feed-forward branches of a block."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sora_fast.nn.normed import Normed, is_plain, linear, product
from sora_fast.ops.mlp_activation import backend_for, mlp_activation


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear (DiT)."""

    activation, parts = "gelu", 1

    def __init__(self, dim: int, hidden: int, *, recompute: bool = False) -> None:
        """recompute: keep what comes out of fc1 for the backward pass, but not what goes into fc2, which is made again:
        `hidden` numbers a token less, of twice as many (SwiGLU: of three times). (Inductor does so by itself, but not
        where Triton kernels run, which it does not look into.)
        """
        super().__init__()
        self.recompute = recompute
        self.fc1 = nn.Linear(dim, self.parts * hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor | Normed) -> Tensor:
        """[N, C] → [N, C]"""
        # Chosen once: a backward pass, which may run in a thread of its own, knows nothing of `use_backend`.
        backend = backend_for(x.h if isinstance(x, Normed) else x)
        hidden, bias = _product(self.fc1, x, backend)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._rest, hidden, bias, backend, use_reentrant=False, preserve_rng_state=False)
        return self._rest(hidden, bias, backend)

    def _rest(self, hidden: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return self.fc2(mlp_activation(hidden, bias, self.activation, backend=backend))


class SwiGLU(Mlp):
    """Linear to two halves, SiLU of the first times the second, Linear (Shazeer 2020).

    Two thirds of the hidden width, in steps of 8, so that it has the parameters of `Mlp`.
    """

    activation, parts = "swiglu", 2

    def __init__(self, dim: int, hidden: int, *, recompute: bool = False) -> None:
        super().__init__(dim, -(-2 * hidden // 24) * 8, recompute=recompute)


def _product(module: nn.Module, x: Tensor | Normed, backend: str) -> tuple[Tensor, Tensor | None]:
    """What `module` makes of x, and the bias that is still to be added: it is left to the activation's kernel where
    that runs."""
    if is_plain(module) and module.bias is not None and backend != "torch":
        return product(x, module.weight, None), module.bias
    return linear(module, x), None
