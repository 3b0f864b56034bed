"""The last step of every reduction over tokens: partial sums added in a fixed order, without atomics."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._launch import launch


@dataclass(frozen=True)
class FoldConfig:
    """The order of the sum follows from these numbers alone, so it is the same on every GPU."""

    rows: int = 16  # partials a step: enough loads in flight for a sum of thousands of rows
    columns: int = 64  # 256 bytes of a row: whole cache lines
    num_warps: int = 4


def fold(partials: Tensor, config: FoldConfig = FoldConfig()) -> Tensor:
    """Sum over the first axis. partials: [P, ...] fp32 contiguous; returns [...] fp32."""
    total = torch.empty(partials.shape[1:], dtype=torch.float32, device=partials.device)
    grid = (triton.cdiv(total.numel(), config.columns),)
    meta = {"ROWS": config.rows, "COLUMNS": config.columns, "num_warps": config.num_warps}
    launch(_fold, grid, partials, total, partials.shape[0], total.numel(), **meta)
    return total


@triton.jit
def _fold(partials, total, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    held = columns < num_columns
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + rows
        place = row[:, None].to(tl.int64) * num_columns + columns[None, :]
        sums += tl.load(partials + place, mask=(row < num_rows)[:, None] & held[None, :], other=0.0)
    tl.store(total + columns, tl.sum(sums, axis=0), mask=held)
