"""adaLN-Zero: the table of shifts, scales and gates that conditions a block (DiT, Peebles & Xie 2023, Sec. 3.2)."""

from torch import Tensor, nn


class AdaLNZero(nn.Sequential):
    """SiLU then Linear from the conditioning rows [M, C] to `chunks` tables [M, C]; zero at the start.

    It runs on M rows, never on N tokens; tokens look their row up inside the fused ops.
    """

    def __init__(self, dim: int, chunks: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, chunks * dim))
        self.chunks = chunks
        nn.init.zeros_(self[1].weight)
        nn.init.zeros_(self[1].bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """condition [M, C] → `chunks` tables [M, C], each contiguous.

        (As strided views of one tensor the last block, followed by the final layer's two, would need a compiled graph
        of its own.)
        """
        tables = super().forward(condition).unflatten(1, (self.chunks, -1))
        return tables.transpose(0, 1).contiguous().unbind(0)
