"""Packed attention in plain PyTorch: dense attention of one run of queries after the other, never N × N of the pack.

A run is queries that lie together and meet the same key tiles: a whole segment under the full mask, a tile or more
under any other. It reads the layout's numbers on the host, so on a GPU it waits for the device.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sora_fast.schedule import GUARD

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Run(NamedTuple):
    """Queries `rows`, the keys that they may meet, and which pairs are allowed [rows, keys] (None: all)."""

    rows: slice
    keys: slice | Tensor
    allowed: Tensor | None


class Masking(NamedTuple):
    """What pairs are tested with: packed boxes of the queries, places of the keys, raster places if causal."""

    low: Tensor
    high: Tensor
    place: Tensor
    query_raster: Tensor | None
    key_raster: Tensor | None


def segment_runs(query_offsets: Tensor, key_offsets: Tensor) -> Iterator[Run]:
    """The full mask: each segment meets all of its own keys."""
    starts, key_starts = query_offsets.tolist(), key_offsets.tolist()
    for i in range(len(starts) - 1):
        rows, keys = slice(starts[i], starts[i + 1]), slice(key_starts[i], key_starts[i + 1])
        if rows.stop > rows.start and keys.stop > keys.start:
            yield Run(rows, keys, None)


def tile_runs(
    query_tiles: Tensor,
    key_tiles: Tensor,
    begin: Tensor,
    full_end: Tensor,
    end: Tensor,
    tiles: Tensor,
    masking: Masking,
) -> Iterator[Run]:
    """Any other mask: neighbouring query tiles that meet the same key tiles make a run together."""
    starts, key_starts = query_tiles.tolist(), key_tiles.tolist()
    begins, full_ends, ends, met = begin.tolist(), full_end.tolist(), end.tolist(), tiles.tolist()
    lists = [sorted(met[first:last]) for first, last in zip(begins, ends, strict=True)]
    tile, count = 0, len(lists)
    while tile < count:
        last = tile + 1
        while last < count and lists[last] == lists[tile]:
            last += 1
        rows = slice(starts[tile], starts[last])
        if lists[tile] and rows.stop > rows.start:
            keys = torch.cat([torch.arange(key_starts[t], key_starts[t + 1]) for t in lists[tile]]).to(tiles.device)
            whole = full_ends[tile:last] == ends[tile:last]
            yield Run(rows, keys, None if whole else _allowed(masking, rows, keys))
        tile = last


def _allowed(masking: Masking, rows: slice, keys: Tensor) -> Tensor:
    place = masking.place[keys]
    inside = ((place | GUARD) - masking.low[rows, None]) & ((masking.high[rows, None] | GUARD) - place) & GUARD
    allowed = inside == GUARD
    if masking.query_raster is not None:
        allowed &= masking.key_raster[keys] <= masking.query_raster[rows, None]
    return allowed


def forward(q: Tensor, k: Tensor, v: Tensor, runs: Iterator[Run], scale: float) -> tuple[Tensor, Tensor]:
    """Output [N, H, D] and natural logsumexp [H, N]; zeros and −inf for queries that meet no key."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=wide, device=q.device)
    for rows, keys, allowed in runs:
        if allowed is None and q.device.type == "cpu":
            made, found = _flash(_heads(q[rows]), _heads(k[keys]), _heads(v[keys]), scale=scale)
            out[rows], lse[:, rows] = made[0].transpose(0, 1), found[0]
            continue
        scores = _scores(q[rows], k[keys], allowed, scale)
        lse[:, rows] = scores.logsumexp(dim=2)
        weights = _weights(scores, lse[:, rows])
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v[keys].to(wide)).to(out.dtype)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    runs: Iterator[Run],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. grad_lse: [H, N], or None for zero."""
    wide = lse.dtype
    grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v)]
    for rows, keys, allowed in runs:
        if allowed is None and q.device.type == "cpu" and grad_lse is None:
            inputs = [_heads(x) for x in (grad_out[rows], q[rows], k[keys], v[keys], out[rows])]
            parts = _flash_backward(*inputs, lse[None, :, rows], 0.0, False, scale=scale)
            parts = [part[0].transpose(0, 1) for part in parts]
        else:
            row_grad, row_q, row_out = (x[rows].to(wide) for x in (grad_out, q, out))
            weights = _weights(_scores(q[rows], k[keys], allowed, scale), lse[:, rows])
            delta = torch.einsum("qhd,qhd->hq", row_grad, row_out)
            if grad_lse is not None:
                delta = delta - grad_lse[:, rows]
            slopes = torch.einsum("qhd,khd->hqk", row_grad, v[keys].to(wide)) - delta[:, :, None]
            slopes = weights * slopes * scale
            parts = [
                torch.einsum("hqk,khd->qhd", slopes, k[keys].to(wide)),
                torch.einsum("hqk,qhd->khd", slopes, row_q),
                torch.einsum("hqk,qhd->khd", weights, row_grad),
            ]
        for grad, place, part in zip(grads, (rows, keys, keys), parts, strict=True):
            # Tiles of keys meet several runs; a run names none of its keys twice.
            grad[place] += part
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))


def _heads(x: Tensor) -> Tensor:
    """[L, H, D] → [1, H, L, D], a view."""
    return x.transpose(0, 1)[None]


def _scores(q: Tensor, k: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) * scale
    return scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    # A query without a key has lse −inf: −inf − −inf would be NaN.
    return (scores - lse.masked_fill(lse == float("-inf"), 0.0)[:, :, None]).exp()
