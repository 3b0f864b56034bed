"""RMSNorm of every head and rotary positions from tables, as video models have them written out."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.entrants import Absent, Entrant
from benchmarks.peers.compiling import compiled as compile_peer

Norm = Callable[[Tensor, Tensor], Tensor]


def eager(case: Case) -> Entrant:
    return Entrant.peer(case, _written_out(case, _plain_norm))


def compiled(case: Case) -> Entrant:
    return compile_peer(case, _written_out(case, _plain_norm))


def compiled_with_tables(case: Case) -> Entrant:
    """With the tables made at every call, as ours does."""
    return compile_peer(case, _written_out(case, _plain_norm, made_before=False))


def liger(case: Case) -> Entrant:
    """Its RMSNorm; the rotation is PyTorch's."""
    if not case.inputs[0].is_cuda:
        raise Absent("it needs a GPU")
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError as error:
        raise Absent("liger-kernel is not installed") from error
    # offset 0, the whole norm in the input's dtype but for its statistics, and nothing overwritten: x is a view.
    return Entrant.peer(
        case,
        _written_out(case, lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)),
    )


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def _written_out(case: Case, norm: Norm, *, made_before: bool = True) -> Callable[..., tuple[Tensor, Tensor]]:
    """made_before: the tables, once a batch."""
    layout, rope = case.args[-2:]
    places, head_dim = (layout.segment_ids, layout.coords, layout.grids), case.args[0].shape[2]

    def tables() -> tuple[Tensor, Tensor]:
        angles = rope.angles(head_dim, *places, case.options["segment_scale"])[:, None]
        return angles.cos(), angles.sin()

    made = tables() if made_before else None

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = x.float()
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if rope.interleaved else wide.chunk(2, dim=-1)
        turned = (a * cos - b * sin, a * sin + b * cos)
        return (torch.stack(turned, dim=-1).flatten(-2) if rope.interleaved else torch.cat(turned, dim=-1)).type_as(x)

    def run(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
        turns = made or tables()
        return rotate(norm(q, q_weight), *turns), rotate(norm(k, k_weight), *turns)

    return run
