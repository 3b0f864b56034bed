import torch
from torch import Tensor

from sora_fast.proof.rule import poisoned_scratch


def test_fold_finishes_what_chunks_have_left(device: torch.device) -> None:
    from sora_fast.kernels._rows import CHUNK, Sums, fold

    lengths = torch.zeros(300, dtype=torch.int32)
    # Neighbours that one program folds: through two chunks, and through more than it reads in a step. Then rows that
    # their chunks have finished, and one that begins with a chunk.
    lengths[10], lengths[11], lengths[12], lengths[14] = CHUNK + 5, 40 * CHUNK, 3, 2 * CHUNK
    lengths[13] = -lengths.sum() % CHUNK
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    table = torch.zeros(300, 5, device=device)
    with poisoned_scratch():
        sums = Sums.empty(table, 2, 300, int(offsets[-1]))
    expected = torch.zeros(2, 300, 5)
    for row, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        for chunk in range(begin // CHUNK, -(-end // CHUNK) if end > begin else 0):
            # Whole numbers: the sum is exact in any order.
            part = torch.randint(-100, 100, (2, 5)).float()
            expected[:, row] += part
            _place(sums, row, chunk, cut=begin // CHUNK != (end - 1) // CHUNK, inside=begin < chunk * CHUNK)[:] = part
    with poisoned_scratch():
        tables, affine = fold(sums, offsets.to(device), table)
    assert torch.equal(tables.cpu(), expected)
    assert affine.shape == (0, 5)


def _place(sums: "Sums", row: int, chunk: int, *, cut: bool, inside: bool) -> Tensor:  # noqa: F821
    """Where `chunk` leaves what it has added up for `row`. inside: the row has begun before the chunk."""
    return sums.parts[2 * chunk + (not inside)] if cut else sums.tables[:, row]
