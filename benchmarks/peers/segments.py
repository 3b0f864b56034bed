"""A mean for each segment."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.entrants import Entrant
from benchmarks.peers.compiling import compiled as compile_peer


def eager(case: Case) -> Entrant:
    return Entrant.peer(case, _one_by_one(case))


def compiled(case: Case) -> Entrant:
    return compile_peer(case, _one_by_one(case))


def _one_by_one(case: Case) -> Callable[[Tensor], Tensor]:
    lengths = case.args[1].cu_seqlens.diff().tolist()
    return lambda x: torch.stack([part.mean(dim=0) for part in x.split(lengths)])
