"""Packed attention by the CUDA C++ kernels for Hopper: which tensors they take, and how they are called.

They read q, k, v and the gradient of the output through the tensor memory accelerator, which asks for columns side by
side, and addresses and strides of 16 bytes. All gradients are sums in a fixed order: the same bits in every run.
"""

from functools import lru_cache

import torch
from torch import Tensor

from sora_fast.ops import _library
from sora_fast.schedule import TileSchedule

MAX_HEAD_DIM = 128
_TINY = torch.finfo(torch.float32).tiny


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why not, for users; None if the kernels take such tensors."""
    if (reason := refusal_here(q.device, q.dtype)) is not None:
        return reason
    if q.shape[2] > MAX_HEAD_DIM or q.shape[2] % 8:
        return f"head dim {q.shape[2]}; its kernels take multiples of 8 up to {MAX_HEAD_DIM}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _readable(x.stride()):
            return f"{name} has strides {tuple(x.stride())}; its kernels take multiples of 8, and 1 for the last"
    return None


def refusal_of_mask(schedule: TileSchedule) -> str | None:
    """Why not this mask, for users."""
    if schedule.mask.causal_tokens and (schedule.cross or schedule.layout.is_joint):
        which = "kv_layout" if schedule.cross else "a joint layout"
        return f"a token-causal mask with {which}; its kernels know one raster place a token, as query and as key"
    return None


def refusal_here(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why not on a GPU in a dtype, whatever the shapes are."""
    if _major(device) != 9:
        return "its kernels are for compute capability 9.0 (Hopper)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels are for bfloat16 and float16, not {dtype}"
    return None


@lru_cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


# A graph keeps the answer, as it keeps the backend that was chosen: see _dispatch.choose.
_major._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _readable(strides: tuple[int, ...]) -> bool:
    token, head, dim = strides
    return dim == 1 and all(0 < stride < 1 << 39 and stride % 8 == 0 for stride in (token, head))


def forward(q: Tensor, k: Tensor, v: Tensor, schedule: list[Tensor], mask: int, scale: float) -> tuple[Tensor, Tensor]:
    """Output [N, H, D] and natural logsumexp [H, N] float32.

    schedule: what the ops of packed attention take. mask: 0 full, 1 boxes, 2 boxes and the raster order.
    """
    q, scale = _positive(q, scale)
    q, k, v = map(_aligned, (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    tiles, boxes, by_query, _, lists = _sides(schedule)
    _library.function("attention_forward")(q, k, v, *tiles, *boxes, *by_query, lists, mask, scale, out, lse)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: list[Tensor],
    mask: int,
    scale: float,
    *,
    keys: bool,
) -> list[Tensor]:
    """Gradients of q, k and v; keys: False: of q alone. As `forward` took and gave it; grad_lse [H, N]."""
    negative = scale < 0
    q, scale = _positive(q, scale)
    grad_out, q, k, v = map(_aligned, (grad_out, q, k, v))
    grad_lse = lse.new_empty(0) if grad_lse is None else grad_lse.float().contiguous()
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in ((q, k, v) if keys else (q,))]
    wanted = grads if keys else [*grads, q.new_empty(0), q.new_empty(0)]
    tiles, boxes, by_query, by_key, lists = _sides(schedule)
    inputs = grad_out, grad_lse, q, k, v, out, lse, *tiles, *boxes, *by_query, *by_key, lists, mask, scale
    _library.function("attention_backward")(*inputs, *wanted, torch.empty_like(lse), torch.empty_like(lse))
    if negative:
        grads[0].neg_()
    return grads


def _aligned(x: Tensor) -> Tensor:
    """A copy if x starts or steps where the accelerator cannot read: slices at odd places, expanded gradients."""
    return x if _readable(x.stride()) and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The largest score is looked for before scaling; and 0 · −inf, of a pair that is not allowed, would be NaN."""
    return (-q if scale < 0 else q), max(abs(scale), _TINY)


def _sides(
    schedule: list[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], bool]:
    """Tile boundaries, boxes and places, the two sides, and whether those are lists of tiles."""
    tiles, boxes, sides = schedule[2:4], schedule[4:8], schedule[9:]  # 8: raster places of keys
    half = len(sides) // 2
    lists = half == 5
    by_query, by_key = sides[:half], sides[half:]
    if not lists:
        by_query, by_key = ([*side, side[0][:0]] for side in (by_query, by_key))
    return tiles, boxes, by_query, by_key, lists
