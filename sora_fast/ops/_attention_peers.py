"""Packed attention by flash-attn and xformers, where one of them is installed and asked for by name."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.packing import PackedLayout
from sora_fast.schedule import TileSchedule

_DTYPES = (torch.float16, torch.bfloat16)
_MASKS = (SpacetimeMask.full(), SpacetimeMask.token_causal())
# Both go no further.
_MAX_HEAD_DIM = 256


def offered(
    q: Tensor, k: Tensor, schedule: TileSchedule, *, cross: bool, lse: bool, deterministic: bool | None
) -> tuple[str, ...]:
    """Which of the two can do this, if they are there. Neither gives a logsumexp with a gradient."""
    if lse or q.dtype not in _DTYPES or q.shape[2] > _MAX_HEAD_DIM or schedule.mask not in _MASKS:
        return ()
    # Their causal mask goes by the ends of both sides, not by places, and lets no token see all.
    if (cross or schedule.layout.is_joint) and not schedule.mask.is_full:
        return ()
    # What xformers gives to a query without a key, or in what order it sums, it does not say.
    told = not cross and not ordered(deterministic) and q.shape[1] == k.shape[1]
    return ("flash_attn", "xformers") if told else ("flash_attn",)


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, schedule: TileSchedule, *, scale: float, deterministic: bool | None
) -> Tensor:
    """By `flash_attn.flash_attn_varlen_func`; never waits for the device."""
    from flash_attn import flash_attn_varlen_func

    options = {"softmax_scale": scale, "deterministic": ordered(deterministic)}
    return by_lengths(partial(flash_attn_varlen_func, **options), q, k, v, schedule)


def by_lengths(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, schedule: TileSchedule) -> Tensor:
    """By a function of flash-attn's kind: attend(q, k, v, cu_seqlens of both, longest of both, causal=)."""
    layout, keys = schedule.layout, schedule.kv_layout
    # The longest lengths size its launch only, and the capacities bound them.
    sizes = (layout.cu_seqlens, keys.cu_seqlens, layout.capacity, keys.capacity)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, *sizes, causal=schedule.mask.causal_tokens)

    # It neither reads nor writes past the last segment: what stands there is not zero, nor are its gradients.
    q, k, v = (without_padding(x, own) for x, own in ((q, layout), (k, keys), (v, keys)))
    return without_padding(_in_raster_order(run, q, k, v, schedule), layout)


def xformers(
    q: Tensor, k: Tensor, v: Tensor, schedule: TileSchedule, *, scale: float, deterministic: bool | None
) -> Tensor:
    """By `xformers.ops.memory_efficient_attention`. Its mask wants the lengths on the host: waits for the device."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = [length for length in schedule.layout.cu_seqlens.diff().tolist() if length]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        used = (x[None, : sum(lengths)] for x in (q, k, v))
        bias = BlockDiagonalMask.from_seqlens(lengths)
        bias = bias.make_causal() if schedule.mask.causal_tokens else bias
        out = memory_efficient_attention(*used, attn_bias=bias, scale=scale)[0]
        return torch.cat([out, out.new_zeros(q.shape[0] - out.shape[0], *q.shape[1:])])

    return _in_raster_order(attend, q, k, v, schedule) if lengths else without_padding(q, schedule.layout)


def ordered(deterministic: bool | None) -> bool:
    """Whether gradients must be the same bits in every run."""
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic


def without_padding(x: Tensor, layout: PackedLayout) -> Tensor:
    """[N, H, D] with zeros past the last segment, whatever stands there."""
    return torch.where((layout.segment_ids >= 0)[:, None, None], x, 0)


def _in_raster_order(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, schedule: TileSchedule
) -> Tensor:
    """Their causal mask goes by position: tokens that lie in any other order are sorted for it, and put back."""
    if not schedule.mask.causal_tokens:
        return attend(q, k, v)
    layout = schedule.layout
    segments = torch.where(layout.segment_ids >= 0, layout.segment_ids, layout.max_segments).long()
    order = torch.argsort(segments << 32 | layout.raster_index, stable=True)
    return attend(q[order], k[order], v[order])[torch.argsort(order)]
