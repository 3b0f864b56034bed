"""DiT's modulation written out, by PyTorch and with Liger's LayerNorm. Padding is beyond all of them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.entrants import Absent, Entrant
from benchmarks.peers.compiling import compiled as compile_peer

Norm = Callable[[Tensor], Tensor]


def eager(case: Case) -> Entrant:
    return Entrant.peer(case, written_out(case, plain_norm))


def compiled(case: Case) -> Entrant:
    return compile_peer(case, written_out(case, plain_norm))


def liger(case: Case) -> Entrant:
    """Its LayerNorm wants a weight and a bias; the rest is PyTorch, compiled around it where that works."""
    if not case.inputs[0].is_cuda:
        raise Absent("it needs a GPU")
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError as error:
        raise Absent("liger-kernel is not installed") from error
    x = case.inputs[0].detach()
    one, zero = torch.ones_like(x[0]), torch.zeros_like(x[0])
    return Entrant.peer(case, written_out(case, lambda x: LigerLayerNormFunction.apply(x, one, zero, 1e-6)))


PEERS = {"eager": eager, "compiled": compiled}


def plain_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], eps=1e-6)


def written_out(case: Case, norm: Norm) -> Callable[..., Any]:
    """The op's formula as a function of its tensors."""
    index = case.args[-1].index

    def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return norm(x) * (1 + scale[index]) + shift[index]

    def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return residual + gate[index] * branch

    def gated_residual_adaln(
        residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = gated_residual(residual, branch, gate)
        return h, adaln(h, shift, scale)

    formulas = {f.__name__: f for f in (adaln, gated_residual, gated_residual_adaln)}
    return formulas[case.op.__name__]
