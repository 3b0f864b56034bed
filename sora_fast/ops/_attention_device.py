"""Packed attention by PyTorch's own kernels on a GPU: what the torch backend is there. Nothing is read on the host, and
all shapes are static, so that it compiles in one graph and can be captured.

Full and token-causal masks in 16 bits take torch.nn.attention.varlen, everything else FlexAttention, compiled.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from sora_fast.ops._attention_peers import by_lengths, ordered, without_padding
from sora_fast.schedule import TileSchedule

# FlexAttention's kernels take no fewer channels.
_LEAST_HEAD_DIM = 16
_MOST_VARLEN_HEAD_DIM = 256


def fits(q: Tensor, k: Tensor) -> bool:
    """On a GPU (and on "meta", where there is nothing to read), but for fp64 and packs without a token."""
    there = q.device.type in ("cuda", "meta") and q.dtype != torch.float64
    return there and q.shape[0] > 0 and k.shape[0] > 0


def attention(
    q: Tensor, k: Tensor, v: Tensor, schedule: TileSchedule, *, scale: float, lse: bool, deterministic: bool | None
) -> Tensor | tuple[Tensor, Tensor]:
    """[N, H, D], and with `lse` the logsumexp [N, H]."""
    if not lse and has_varlen(q, schedule, deterministic):
        return varlen(q, k, v, schedule, scale=scale)
    out, sums = flex(q, k, v, schedule, scale=scale)
    return (out, sums) if lse else out


def has_varlen(q: Tensor, schedule: TileSchedule, deterministic: bool | None) -> bool:
    """Whether varlen can do it: flash-attn's kernels, from Ampere on; their backward pass adds up in any order."""
    past = schedule.mask.causal_tokens and schedule.mask.sees_past
    mask = schedule.mask.is_full or (past and not schedule.cross and not schedule.layout.is_joint)
    small = q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] <= _MOST_VARLEN_HEAD_DIM
    return q.is_cuda and mask and small and not ordered(deterministic) and varlen_options(q.device) is not None


@cache
def varlen_options(device: torch.device) -> tuple[str, ...] | None:
    """What varlen_attn of this PyTorch takes; None where there is none, or none for the device."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    there = torch.cuda.get_device_capability(device) >= (8, 0)
    return tuple(inspect.signature(varlen_attn).parameters) if there else None


# A graph keeps the answer, as it keeps the backend that was chosen: see _dispatch.choose.
varlen_options._dynamo_marked_constant = True  # type: ignore[attr-defined]


def varlen(q: Tensor, k: Tensor, v: Tensor, schedule: TileSchedule, *, scale: float) -> Tensor:
    """By `torch.nn.attention.varlen.varlen_attn`. PyTorch 2.10 has neither its scale nor its grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    known = varlen_options(q.device)

    def attend(q: Tensor, k: Tensor, v: Tensor, *sizes: Tensor | int, causal: bool) -> Tensor:
        options: dict[str, object] = {}
        if causal:
            options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        if "scale" in known:
            options["scale"] = scale
        else:
            q = q * (scale * math.sqrt(q.shape[2]))
        if k.shape[1] != q.shape[1] and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return varlen_attn(q, k, v, *sizes, **options)

    return by_lengths(attend, q, k, v, schedule)


def flex(q: Tensor, k: Tensor, v: Tensor, schedule: TileSchedule, *, scale: float) -> tuple[Tensor, Tensor]:
    """Output [N, H, D] and logsumexp [N, H] by FlexAttention; zeros and −inf for queries without a key.

    Its BlockMask is made at every call, from the schedule: a dozen small ops.
    """
    layout, keys = schedule.layout, schedule.kv_layout
    narrow = max(0, _LEAST_HEAD_DIM - q.shape[2])
    # Weights of 0 keep no NaN out.
    q, k, v = (without_padding(x, own) for x, own in ((q, layout), (k, keys), (v, keys)))
    batch = (F.pad(x, (0, narrow)).transpose(0, 1)[None] for x in (q, k, v))
    options = {"block_mask": schedule.to_block_mask(), "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    # A graph that is being compiled takes it as it is, and "meta" only asks for shapes.
    plain = torch.compiler.is_compiling() or q.is_meta
    mask = schedule.mask.causal_tokens, schedule.cross, layout.is_joint
    kind = (q.device, q.dtype, q.shape, k.shape, *mask, torch.is_grad_enabled())
    attend = flex_attention if plain else _compiled_flex(*kind)
    out, aux = attend(*batch, **options, return_aux=AuxRequest(lse=True))
    out = without_padding(out[0].transpose(0, 1)[:, :, : v.shape[2]], layout)
    # −∞ is a constant, whatever comes back for it: NaN where two such results were merged by logaddexp.
    sums = aux.lse[0].transpose(0, 1)
    return out, torch.where(sums == -math.inf, -math.inf, sums)


@cache
def _compiled_flex(*kind: object) -> Callable[..., tuple[Tensor, object]]:
    """Uncompiled it would make all scores, and so it would be after eight kinds of calls, without a word: Dynamo counts
    the graphs of a code object. Each kind has one of its own, and an error if one is not enough."""

    def attend(*args: Tensor, **options: object) -> tuple[Tensor, object]:
        return flex_attention(*args, **options)

    attend.__code__ = attend.__code__.replace()
    return torch.compile(attend, fullgraph=True, dynamic=False)
