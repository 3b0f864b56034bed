"""Dense batches [B, N, …] as packs of B segments of N tokens: no copy, and what describes them is made once."""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch import Tensor

from sora_fast.integrations.lines import layout_from_cu_seqlens
from sora_fast.packing import PackedLayout, RowIndex
from sora_fast.schedule import TileSchedule

# Kinds of batches that are kept; a training step has two, a sampler's as many.
_MOST = 32


def _kept(make: Callable) -> Callable:
    """Made once for the same arguments, for all layers and steps; a compiled graph makes its own, which it can fuse."""
    cached = lru_cache(_MOST)(make)

    @wraps(make)
    def get(*sizes: int | torch.device | None) -> PackedLayout | TileSchedule | RowIndex:
        if torch.compiler.is_compiling():
            return make(*sizes)
        with torch.inference_mode(False):  # what sampling made, training keeps for its backward pass
            return cached(*sizes)

    return get


@_kept
def layout_of(batch: int, length: int, device: torch.device) -> PackedLayout:
    """B · N tokens, a segment a sample."""
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    return layout_from_cu_seqlens(offsets, capacity=batch * length)


@_kept
def schedule_of(batch: int, length: int, keys: int | None, device: torch.device) -> TileSchedule:
    """Every token of a sample sees all of that sample, or, where `keys` says how many, all its keys."""
    kv_layout = None if keys is None else layout_of(batch, keys, device)
    return TileSchedule.build(layout_of(batch, length, device), kv_layout=kv_layout)


@_kept
def rows_of(samples: int, tokens: int, device: torch.device) -> RowIndex:
    """For a table of one row a sample, each for so many tokens in line; of one token, a row each."""
    offsets = torch.arange(samples + 1, dtype=torch.int32, device=device) * tokens
    index = torch.arange(samples * tokens, dtype=torch.int32, device=device)
    return RowIndex(index // tokens, offsets, index)


def flat(x: Tensor) -> Tensor:
    """[B, N, …] → [B · N, …]."""
    return x.flatten(0, 1)
