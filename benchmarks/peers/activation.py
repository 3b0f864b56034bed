"""A bias and an activation, as PyTorch has them."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.entrants import Entrant
from benchmarks.peers.compiling import compiled as compile_peer


def eager(case: Case) -> Entrant:
    return Entrant.peer(case, _written_out(case))


def compiled(case: Case) -> Entrant:
    return compile_peer(case, _written_out(case))


def _written_out(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    def swiglu(x: Tensor, bias: Tensor) -> Tensor:
        gate, value = (x + bias).chunk(2, dim=1)
        return F.silu(gate) * value

    def swiglu_second(x: Tensor, bias: Tensor) -> Tensor:
        value, gate = (x + bias).chunk(2, dim=1)
        return value * F.silu(gate)

    def gelu(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate="none" if case.args[2] == "gelu_erf" else "tanh")

    if case.args[2] != "swiglu":
        return gelu
    return swiglu_second if case.options.get("gate") == "second" else swiglu
