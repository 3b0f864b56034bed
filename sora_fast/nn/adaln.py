"""The tables of shifts, scales and gates that condition a block: adaLN-Zero (DiT) and adaLN-single (PixArt-α)."""

import torch
from torch import Tensor, nn


class AdaLNZero(nn.Sequential):
    """SiLU then Linear from the conditioning rows [M, C] to `chunks` tables [M, C]; zero at the start.

    Peebles & Xie 2023, Sec. 3.2.

    It runs on M rows, never on N tokens; tokens look their row up inside the fused ops.
    """

    def __init__(self, dim: int, chunks: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, chunks * dim))
        self.chunks = chunks
        nn.init.zeros_(self[1].weight)
        nn.init.zeros_(self[1].bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """condition [M, C] → `chunks` tables [M, C], each contiguous."""
        return _tables(super().forward(condition).unflatten(1, (self.chunks, -1)))


class AdaLNSingle(nn.Module):
    """A learned offset for every table of one modulation that all blocks share (PixArt-α, arXiv:2310.00426, Sec. 2.3).

    The shared modulation, SiLU then Linear of the conditioning, is the caller's: it runs once a model. What is left to
    a block is `chunks` · C parameters and one addition on M rows.
    """

    def __init__(self, dim: int, chunks: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(chunks, dim) / dim**0.5)

    def forward(self, shared: Tensor) -> tuple[Tensor, ...]:
        """shared [M, chunks · C] → `chunks` tables [M, C], each contiguous; [M, C] serves every chunk alike, as
        PixArt's final layer has it. In the dtype of `shared`, as under autocast AdaLNZero's are.
        """
        chunks, dim = self.scale_shift_table.shape
        if shared.ndim != 2 or shared.shape[1] not in (dim, chunks * dim):
            raise ValueError(f"shared: shape {tuple(shared.shape)}; it must be [M, {chunks * dim}] or [M, {dim}]")
        return _tables((shared.unflatten(1, (-1, dim)) + self.scale_shift_table).to(shared.dtype))


def _tables(stacked: Tensor) -> tuple[Tensor, ...]:
    """[M, chunks, C] as `chunks` contiguous tables.

    (As strided views of one tensor the last block, followed by the final layer's two, would need a compiled graph of
    its own.)
    """
    return stacked.transpose(0, 1).contiguous().unbind(0)
