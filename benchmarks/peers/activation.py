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

    return swiglu if case.args[2] == "swiglu" else lambda x, bias: F.gelu(x + bias, approximate="tanh")
