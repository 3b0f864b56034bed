"""packed_attention: attention inside every segment of a pack, under any spacetime mask."""

import math
from collections.abc import Iterator
from dataclasses import fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.ops import _attention_cpu as on_cpu
from sora_fast.ops import _attention_cuda as compiled
from sora_fast.ops import _attention_device as on_device
from sora_fast.ops import _attention_peers as peers
from sora_fast.ops import _attention_torch as plain
from sora_fast.ops._checks import FLOAT_DTYPES, KERNEL_DTYPES, check_device, check_dtype, check_shape, may_read, once
from sora_fast.ops._dispatch import choose
from sora_fast.ops._op import kernels, op
from sora_fast.packing import PackedLayout
from sora_fast.schedule import TileLists, TileSchedule, TokenRanges

# The kernels cover a head by a power of two and the rest (72 = 64 + 16); past 256 nothing would fit on chip.
MAX_KERNEL_HEAD_DIM = 256


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    mask: SpacetimeMask | TileSchedule | None = None,
    *,
    kv_layout: PackedLayout | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v over the keys that each query may attend.

    q: [N, H, D]; k, v: [Nk, Hk, D] of the same dtype: bf16, fp16 or fp32 (fp64 on the torch backend), any strides. Hk
        divides H: grouped queries, head h attends head h // (H / Hk) of k and v.
    layout: of the queries, N tokens. mask: None is the full one. A mask is made into a schedule at every call; give
        the TileSchedule itself where several layers share it.
    kv_layout: of k and v, where those are others: segment s of q attends segment s of k and v. Under the full mask all
        of it; else both layouts hold tokens of one grid a segment, with their places there (`packing.frame_tokens`).
    scale: default D^−½. return_lse: also the natural logsumexp of the scores, [N, H], differentiable.
    deterministic: whether gradients must be the same bits in every run; None: what
        torch.are_deterministic_algorithms_enabled() says. False lets the triton backend's backward pass add up in any
        order where that is known to be faster, and the torch backend's on a GPU where flash-attn's kernel does.
        Results, and the torch backend's gradients on a CPU, always are the same bits.

    Returns [N, H, D] in q's dtype. A query without a key gives zeros and −inf; padding likewise, with zero gradients,
    whatever stands in it. Raises TypeError or ValueError for arguments that do not fit together.
    """
    _check(q, k, v, layout, mask, kv_layout)
    if isinstance(mask, TileSchedule):
        _check_batch(mask, layout, kv_layout)
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else _checked(scale)
    schedule = mask if isinstance(mask, TileSchedule) else TileSchedule.build(layout, mask, kv_layout=kv_layout)
    cross = kv_layout is not None
    others = peers.offered(q, k, schedule, cross=cross, lse=return_lse, deterministic=deterministic)
    offered, unsuited = _offered(q, k, v, schedule)
    chosen = choose("packed_attention", backend, q.device, (*offered, *others), q.dtype, unsuited=unsuited)
    if chosen in others:
        return getattr(peers, chosen)(q, k, v, schedule, scale=scale, deterministic=deterministic)
    if chosen == "torch" and on_device.fits(q, k):
        return on_device.attention(q, k, v, schedule, scale=scale, lse=return_lse, deterministic=deterministic)
    attend = {"torch": _plain_attention, "cpu": _cpu_attention, "cuda": _cuda_attention}.get(chosen, _triton_attention)
    tile_sizes = [schedule.layout.tile_size, schedule.kv_layout.tile_size]
    deterministic = torch.are_deterministic_algorithms_enabled() if deterministic is None else bool(deterministic)
    out, lse = attend(q, k, v, _tensors(schedule), tile_sizes, _kind(schedule), scale, deterministic)
    return (out, lse.transpose(0, 1)) if return_lse else out


def _checked(scale: float) -> float:
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"scale: {scale!r}; it must be a finite number")
    return float(scale)


# What tiles meet, and how pairs of tokens are tested: in ranges of tokens, all pairs of a segment, those of the past by
# frames or by tokens; in lists of tiles, by boxes, or by boxes and the raster order.
_FULL, _PAST_FRAMES, _PAST_TOKENS, _BOXES, _CAUSAL_BOXES = range(5)
_BY_RASTER = (_PAST_TOKENS, _CAUSAL_BOXES)


def _kind(schedule: TileSchedule) -> int:
    causal = schedule.mask.causal_tokens
    if schedule.mask.is_full:
        return _FULL
    if isinstance(schedule.by_query, TokenRanges):
        return _PAST_TOKENS if causal else _PAST_FRAMES
    return _CAUSAL_BOXES if causal else _BOXES


# In `_tensors`, the two sides stand behind four tensors of the layouts and the five of `Boxes`.
_SIDES = 9
# Of a side of a schedule, in order.
_NAMES = {side: tuple(field.name for field in fields(side)) for side in (TokenRanges, TileLists)}


def _tensors(schedule: TileSchedule) -> list[Tensor]:
    """All that the backends read of a schedule: ops of the dispatcher take tensors only."""
    layout, keys = schedule.layout, schedule.kv_layout
    boxes = (schedule.query_low, schedule.query_high, schedule.key_place, schedule.query_raster, keys.raster_index)
    names = _NAMES[type(schedule.by_query)]
    sides = [getattr(side, name) for side in (schedule.by_query, schedule.by_key) for name in names]
    return [layout.cu_seqlens, keys.cu_seqlens, layout.tile_offsets, keys.tile_offsets, *boxes, *sides]


@op("sora_fast::packed_attention_plain")
def _plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: list[Tensor],
    tile_sizes: list[int],
    kind: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    return plain.forward(q, k, v, _blocks(schedule, kind, join=plain.may_join(q)), scale)


@op("sora_fast::packed_attention_plain_backward")
def _plain_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: list[Tensor],
    tile_sizes: list[int],
    kind: int,
    scale: float,
    deterministic: bool,
    keys: bool,  # whether anybody asks for the gradients of k and v
) -> list[Tensor]:
    blocks = _blocks(schedule, kind, join=plain.may_join(q, grad_lse))
    grads = plain.backward(grad_out, grad_lse, q, k, v, out, lse, blocks, scale)
    return list(grads if keys else grads[:1])


def _blocks(schedule: list[Tensor], kind: int, *, join: bool) -> Iterator[plain.Block]:
    query_offsets, key_offsets, query_tiles, key_tiles, *boxes = schedule[:_SIDES]
    if kind == _FULL:
        return plain.segment_blocks(query_offsets, key_offsets, join=join)
    masking = plain.Masking(*boxes[:3], *(boxes[3:] if kind in _BY_RASTER else (None, None)))
    if kind in (_PAST_FRAMES, _PAST_TOKENS):
        return plain.past_blocks(query_offsets, query_tiles, masking)
    begin, full_end, end, _, tiles = schedule[_SIDES : _SIDES + len(_NAMES[TileLists])]
    return plain.tile_blocks(query_tiles, key_tiles, begin, full_end, end, tiles, masking)


@op("sora_fast::packed_attention_cpu")
def _cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: list[Tensor],
    tile_sizes: list[int],
    kind: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    return on_cpu.forward(q, k, v, _meetings(schedule, kind), scale)


@op("sora_fast::packed_attention_cpu_backward")
def _cpu_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: list[Tensor],
    tile_sizes: list[int],
    kind: int,
    scale: float,
    deterministic: bool,
    keys: bool,  # whether anybody asks for the gradients of k and v
) -> list[Tensor]:
    grads = on_cpu.backward(grad_out, grad_lse, q, k, v, out, lse, _meetings(schedule, kind), scale)
    return grads if keys else grads[:1]


def _meetings(schedule: list[Tensor], kind: int) -> Tensor:
    return on_cpu.full_meetings(*schedule[:2]) if kind == _FULL else on_cpu.past_meetings(schedule[0], schedule[5])


@op("sora_fast::packed_attention")
def _triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: list[Tensor],
    tile_sizes: list[int],
    kind: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    options = {"tile_sizes": tuple(tile_sizes), "scale": scale, "causal": kind in _BY_RASTER}
    return kernels("packed_attention").forward(q, k, v, _walk(schedule, 0), _boxes(schedule, kind), **options)


@op("sora_fast::packed_attention_backward")
def _triton_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: list[Tensor],
    tile_sizes: list[int],
    kind: int,
    scale: float,
    deterministic: bool,
    keys: bool,  # whether anybody asks for the gradients of k and v
) -> list[Tensor]:
    from sora_fast.kernels.packed_attention_backward import backward

    walks = _walk(schedule, 0), _walk(schedule, 1), _boxes(schedule, kind)
    # The gradient of a transposed or summed logsumexp comes in any strides, expanded ones too.
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    options = {"tile_sizes": tuple(tile_sizes), "scale": scale, "causal": kind in _BY_RASTER}
    return backward(grad_out, grad_lse, q, k, v, out, lse, *walks, **options, keys=keys, deterministic=deterministic)


@op("sora_fast::packed_attention_cuda")
def _cuda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: list[Tensor],
    tile_sizes: list[int],
    kind: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    return compiled.forward(q, k, v, schedule, _mask(kind), scale)


@op("sora_fast::packed_attention_cuda_backward")
def _cuda_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: list[Tensor],
    tile_sizes: list[int],
    kind: int,
    scale: float,
    deterministic: bool,
    keys: bool,  # whether anybody asks for the gradients of k and v
) -> list[Tensor]:
    return compiled.backward(grad_out, grad_lse, q, k, v, out, lse, schedule, _mask(kind), scale, keys=keys)


def _mask(kind: int) -> int:
    """As the CUDA kernels call it."""
    return 0 if kind == _FULL else 2 if kind in _BY_RASTER else 1


def _walk(schedule: list[Tensor], side: int) -> Any:
    """From queries to keys (0), or from keys to queries (1)."""
    tiles, sides = schedule[2:4], schedule[_SIDES:]
    half = len(sides) // 2
    return kernels("_attention_walk").Walk(tiles[side], tiles[1 - side], *sides[side * half :][:half])


def _boxes(schedule: list[Tensor], kind: int) -> Any:
    return None if kind == _FULL else kernels("_attention_walk").Boxes(*schedule[4:_SIDES])


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=wide)


def _fake_backward(grad_out: Tensor, grad_lse: Tensor | None, *inputs: Any) -> list[Tensor]:
    keys = inputs[-1]
    return [x.new_empty(x.shape) for x in inputs[: 3 if keys else 1]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, schedule, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, *schedule)
    ctx.set_materialize_grads(False)


def _backward_with(own: Any) -> Any:
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, *schedule = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if grad_lse is not None:
            # −∞ is a constant, whatever comes back for it: NaN where two such results were merged by logaddexp.
            grad_lse = grad_lse.masked_fill(lse == -math.inf, 0.0)
        keys = any(ctx.needs_input_grad[1:3])
        grads = own(grad_out, grad_lse, q, k, v, out, lse, schedule, *ctx.options, keys)
        missing = [None] * (3 - len(grads))
        return *grads, *missing, [None] * len(schedule), *[None] * len(ctx.options)

    return backward


for _op, _op_backward in (
    (_plain_attention, _plain_attention_backward),
    (_cpu_attention, _cpu_attention_backward),
    (_triton_attention, _triton_attention_backward),
    (_cuda_attention, _cuda_attention_backward),
):
    _op.register_fake(_fake)
    _op_backward.register_fake(_fake_backward)
    _op.register_autograd(_backward_with(_op_backward), setup_context=_save)


def _offered(
    q: Tensor, k: Tensor, v: Tensor, schedule: TileSchedule
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Backends that take such tensors, and why not the others, where that can be said."""
    fits = q.dtype in KERNEL_DTYPES and q.shape[2] <= MAX_KERNEL_HEAD_DIM
    offered = ("torch", "triton") if fits else ("torch",)
    if q.device.type == "cuda":
        reasons = {"cuda": compiled.refusal_of_mask(schedule) or compiled.refusal(q, k, v)}
    else:
        reasons = {"cpu": on_cpu.refusal(q.dtype, whole=_kind(schedule) in (_FULL, _PAST_FRAMES))}
    return (*offered, "cpu", "cuda"), tuple((name, reason) for name, reason in reasons.items() if reason is not None)


@once
def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    mask: SpacetimeMask | TileSchedule | None,
    kv_layout: PackedLayout | None,
) -> None:
    for name, given in (("layout", layout), ("kv_layout", kv_layout)):
        if not isinstance(given, PackedLayout) and (given is not None or name == "layout"):
            raise TypeError(f"{name}: {type(given).__name__}; it must be a PackedLayout")
    check_shape("q", q, [layout.capacity, "H", "D"])
    check_dtype("q", q, FLOAT_DTYPES)
    check_device("layout", layout.segment_ids, "q", q.device)
    keys = layout if kv_layout is None else kv_layout
    check_shape("k", k, [keys.capacity, "Hk", q.shape[2]])
    for name, tensor in (("k", k), ("v", v)):
        check_shape(name, tensor, [keys.capacity, *k.shape[1:]])
        check_dtype(name, tensor, [q.dtype])
        check_device(name, tensor, "q", q.device)
    if q.shape[1] == 0 or q.shape[2] == 0:
        raise ValueError(f"q: shape {tuple(q.shape)}; it must have at least one head and one channel")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: {k.shape[1]} heads; their number must divide the {q.shape[1]} heads of q")
    if mask is not None and not isinstance(mask, SpacetimeMask | TileSchedule):
        raise TypeError(f"mask: {type(mask).__name__}; it must be a SpacetimeMask, a TileSchedule or None")
    if isinstance(mask, TileSchedule):
        _check_schedule("layout", mask.layout, layout)
        _check_schedule("layout" if kv_layout is None else "kv_layout", mask.kv_layout, keys)
        # Of like sizes, the one would do the other's work wherever nobody may read the offsets.
        if mask.cross != (kv_layout is not None):
            built, given = ("cross", "without") if mask.cross else ("self", "with")
            raise ValueError(f"mask: a schedule of {built}-attention {given} kv_layout; build it {given} one, too")


def _check_schedule(name: str, scheduled: PackedLayout, given: PackedLayout) -> None:
    """The schedule was built for a layout like the given one."""
    sizes = ("capacity", "max_segments", "max_tiles", "tile_size", "is_raster", "is_joint", "device")
    for size in sizes:
        built, wanted = getattr(scheduled, size), getattr(given, size)
        if built != wanted:
            raise ValueError(f"mask: a schedule for a {name} of {size} {built}, but the {name} has {wanted}")


def _check_batch(schedule: TileSchedule, layout: PackedLayout, kv_layout: PackedLayout | None) -> None:
    """It was built for this very batch, and had room for it; where looking costs nothing."""
    if not may_read(schedule.overflow):
        return
    pairs = {"layout": (schedule.layout, layout), "kv_layout": (schedule.kv_layout, kv_layout)}
    for name, (scheduled, given) in pairs.items():
        if given is not None and not (
            torch.equal(scheduled.cu_seqlens, given.cu_seqlens)
            and torch.equal(scheduled.tile_offsets, given.tile_offsets)
        ):
            raise ValueError(f"mask: a schedule of another batch than the {name}; build it from this one")
    schedule.check()
