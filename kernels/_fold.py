"""The last step of every reduction over tokens: partial sums added in a fixed order, without atomics."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._launch import cdiv, launch


@dataclass(frozen=True)
class FoldConfig:
    """The order of the sum follows from these numbers alone, so it is the same on every GPU."""

    rows: int = 16  # partials a step: their loads are in flight together
    columns: int = 64  # 256 bytes of a row: whole cache lines
    # Partials that a program adds. The sums of more groups than one are folded again, so that a narrow row of
    # thousands of partials (qk_norm_rope: 256 columns, 4,096 partials at 32k tokens) keeps hundreds of programs busy.
    group: int = 64
    num_warps: int = 4


def fold(partials: Tensor, config: FoldConfig = FoldConfig()) -> Tensor:
    """Sum over the first axis. partials: [P, ...] fp32 contiguous; returns [...] fp32."""
    groups = max(1, cdiv(partials.shape[0], config.group))
    sums = torch.empty(groups, *partials.shape[1:], dtype=torch.float32, device=partials.device)
    width = sums[0].numel()
    grid = (cdiv(width, config.columns), groups)
    meta = {"ROWS": config.rows, "COLUMNS": config.columns, "GROUP": config.group, "num_warps": config.num_warps}
    launch(fold_kernel, grid, partials, sums, partials.shape[0], width, **meta)
    return sums[0] if groups == 1 else fold(sums, config)


@triton.jit
def fold_kernel(partials, sums, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(1)
    held = columns < num_columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(group * GROUP, tl.minimum(num_rows, (group + 1) * GROUP), ROWS):
        row = first + tl.arange(0, ROWS)
        place = row[:, None].to(tl.int64) * num_columns + columns[None, :]
        total += tl.load(partials + place, mask=(row < num_rows)[:, None] & held[None, :], other=0.0)
    tl.store(sums + group.to(tl.int64) * num_columns + columns, tl.sum(total, axis=0), mask=held)
