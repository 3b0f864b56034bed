"""Packed attention by the compiled library for CPUs (csrc/cpu/attention.cpp): fp32, full or causal by frames.

No segment costs a call, so that packs of short ones take half the time that PyTorch's kernel takes, called for each;
long ones take about as long.
"""

import math

import torch
from torch import Tensor

from sora_fast.ops import _library
from sora_fast.ops._attention_torch import frame_bounds

# As many numbers a vector as the processor has; tests ask for fewer.
_LANES = 0


def refusal(dtype: torch.dtype, *, whole: bool) -> str | None:
    """Why not; None if it takes such tensors and such a mask. whole: all pairs of a segment, or all of past frames."""
    if dtype != torch.float32:
        return f"its kernel is for float32, not {dtype}"
    if not whole:
        return "its kernel takes the full mask and the frame-causal one, in raster order"
    return None


def full_meetings(query_offsets: Tensor, key_offsets: Tensor) -> Tensor:
    """[S, 4] int64: the tokens from … to of every segment that are queries, and those that are its keys."""
    bounds = (query_offsets[:-1], query_offsets[1:], key_offsets[:-1], key_offsets[1:])
    return torch.stack(bounds, dim=1).long()


def past_meetings(offsets: Tensor, high: Tensor) -> Tensor:
    """[frames, 4] int64: likewise of every frame, and of its segment up to its own end. high: the boxes' upper ends."""
    bounds = frame_bounds(offsets, high)
    first = offsets[torch.searchsorted(offsets, bounds[:-1], right=True) - 1]
    return torch.stack((bounds[:-1], bounds[1:], first, bounds[1:]), dim=1).long()


def forward(q: Tensor, k: Tensor, v: Tensor, meetings: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [N, H, D] and natural logsumexp [H, N]; zeros and −inf for queries that meet no key."""
    q, k, v = map(_in_rows, (q, k, v))
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf)
    _library.function("attention_cpu_forward")(q, k, v, meetings, scale, _LANES, out, lse)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    meetings: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v. grad_lse: [H, N], or None for zero."""
    grad_out, q, k, v = map(_in_rows, (grad_out, q, k, v))
    grad_lse = lse.new_empty(0) if grad_lse is None else grad_lse.contiguous()
    grads = [x.new_zeros(x.shape) for x in (q, k, v)]
    kept = q, k, v, out, lse, meetings
    _library.function("attention_cpu_backward")(grad_out, grad_lse, *kept, scale, _LANES, *grads)
    return grads


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
