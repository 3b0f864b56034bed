"""Rows of several tensors, each row at its place in a new one."""

from torch import Tensor


def filled(size: int, fill: int, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """[size, …] with the rows of every (places, rows) at their places, and `fill` elsewhere; of one dtype.

    places: int64, no two alike but those at `size`, whose rows are for nobody. Differentiable in the rows.
    """
    first = parts[0][1]
    whole = first.new_full((size + 1, *first.shape[1:]), fill)
    for places, rows in parts:
        whole.index_copy_(0, places, rows)
    return whole[:-1]
