"""DiT's modulation written out, by PyTorch and with Liger's LayerNorm. Padding is beyond all of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.entrants import Absent, Entrant
from benchmarks.peers.compiling import compiled as compile_peer
from sora_fast import use_backend
from sora_fast.proof.calls import adaln_pair_of, form_of

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


def with_neutral(case: Case) -> Entrant:
    """Of a form without a table: our own op, given one of zeros, or of ones for a gate, that wants no gradient."""
    absent = getattr(case.op, "absent", ())
    if not absent:
        raise Absent("it has every table")
    x, rows = case.args[0], case.args[-1]
    neutral = [torch.full((rows.num_rows, x.shape[1]), float(place == _GATE and _has_gate(case))) for place in absent]
    neutral = [table.to(x) for table in neutral]

    def run(*tensors: Tensor) -> Any:
        given = list(tensors)
        for place, table in zip(absent, neutral, strict=True):
            given.insert(place, table)
        return case.op.__wrapped__(*given, rows)

    return Entrant.peer(case, run, within=partial(use_backend, "triton" if x.is_cuda else "torch"))


_GATE = 2  # its place among the arguments of the ops that have one


def _has_gate(case: Case) -> bool:
    return case.op.__name__.startswith("gated")


PEERS = {"eager": eager, "compiled": compiled, "zeros for what is absent": with_neutral}


def plain_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], eps=1e-6)


def written_out(case: Case, norm: Norm) -> Callable[..., Any]:
    """The op's formula as a function of its tensors."""
    index = case.args[-1].index

    def adaln(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        y = norm(x)
        y = y if scale is None else y * (1 + scale[index])
        return y if shift is None else y + shift[index]

    def pair(x: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
        y = norm(x)
        return y * (1 + tables[1][index]) + tables[0][index], y * (1 + tables[3][index]) + tables[2][index]

    def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor | None, branch_norm: str | None = None) -> Tensor:
        branch = branch if branch_norm is None else F.rms_norm(branch, branch.shape[1:], eps=1e-6)
        return residual + (branch if gate is None else gate[index] * branch)

    def gated_residual_adaln(
        residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h = gated_residual(residual, branch, gate)
        return h, adaln(h, shift, scale)

    formulas = {f.__name__: f for f in (adaln, gated_residual, gated_residual_adaln)}
    formula = pair if case.op is adaln_pair_of else formulas[case.op.__name__]
    absent = getattr(case.op, "absent", None)
    return formula if absent is None else form_of(formula, *absent, **case.op.options)
