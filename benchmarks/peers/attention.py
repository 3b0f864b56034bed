"""Attention over a pack by PyTorch, flash-attn and xformers, as their documentation has it for sequences of any length.

All of them take tokens in raster order but FlexAttention, which has ours: fewer of its blocks then hold a pair of
tokens that may meet.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Case
from benchmarks.entrants import Absent, Entrant
from benchmarks.peers.compiling import keep_buffers
from benchmarks.peers.order import Raster
from benchmarks.shapes import MASKS
from sora_fast.masks import SpacetimeMask
from sora_fast.packing import PackedLayout

# The largest dense mask [L, L] that is made, in tokens: 1 GiB for one segment.
_LONGEST_MASK = 1 << 15
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Work(NamedTuple):
    """What a peer has to know of a case of self-attention with as many heads for keys as for queries."""

    case: Case
    layout: PackedLayout
    mask: SpacetimeMask
    grids: list[list[int]]

    @staticmethod
    def of(case: Case) -> "_Work":
        q, k, _, layout, schedule = case.args
        if q.shape[1] != k.shape[1]:
            raise Absent("it is measured with as many key heads as query heads")
        return _Work(case, layout, schedule.mask, layout.grids.tolist())

    @property
    def lengths(self) -> list[int]:
        return [t * h * w for t, h, w in self.grids]

    def on_gpu_and_full(self) -> "_Work":
        if self.layout.device.type != "cuda":
            raise Absent("it needs a GPU")
        if not self.mask.is_full:
            raise Absent("it has no such mask")
        return self

    def in_raster_order(self, attention: Attention, **options: Any) -> Entrant:
        order = Raster.of(self.layout)
        return Entrant.peer(self.case, attention, pack=order.pack, unpack=order.unpack, **options)


def sdpa(case: Case, within: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Entrant:
    """Segment after segment; a frame's or a place's tokens as a batch under the masks that cut a segment so."""
    work = _Work.of(case)
    if work.mask == MASKS["spatial"]:
        return work.in_raster_order(_each(work, lambda x, t, h, w: x.view(t, h * w, *x.shape[1:])), within=within)
    if work.mask == MASKS["temporal"]:
        views = _each(work, lambda x, t, h, w: x.view(t, h * w, *x.shape[1:]).transpose(0, 1), swap=True)
        return work.in_raster_order(views, within=within)
    if work.mask.is_full:
        return work.in_raster_order(_each(work, lambda x, *_: x[None]), within=within)
    return work.in_raster_order(_each(work, lambda x, *_: x[None], masks=_dense_masks(work)), within=within)


def _dense_masks(work: _Work) -> list[Tensor]:
    longest = max(work.lengths)
    if longest > _LONGEST_MASK:
        raise Absent(f"its dense mask would take {longest**2 / 2**30:.0f} GiB")
    layouts = (PackedLayout.from_grids([tuple(grid)], device=work.layout.device) for grid in work.grids)
    return [work.mask.materialize(layout) for layout in layouts]


def _each(
    work: _Work, view: Callable[..., Tensor], *, masks: list[Tensor] | None = None, swap: bool = False
) -> Attention:
    """view: a segment [L, H, D] as a batch of sequences [B, L', H, D]. swap: it exchanges the two."""
    pieces = list(zip(work.grids, masks or [None] * len(work.grids), strict=True))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        segments = zip(*(x.split(work.lengths) for x in (q, k, v)), strict=True)
        for parts, (grid, allowed) in zip(segments, pieces, strict=True):
            batch = (view(x, *grid).transpose(1, 2) for x in parts)
            out = F.scaled_dot_product_attention(*batch, attn_mask=allowed).transpose(1, 2)
            outs.append((out.transpose(0, 1) if swap else out).flatten(0, 1))
        return torch.cat(outs)

    return run


def _pinned(backend: SDPBackend, case: Case) -> Entrant:
    if not case.inputs[0].is_cuda:
        raise Absent("it needs a GPU")
    if _Work.of(case).mask not in (MASKS["full"], MASKS["spatial"], MASKS["temporal"]):
        raise Absent("it has no such mask")
    return sdpa(case, lambda: sdpa_kernel(backend))


def sdpa_flash(case: Case) -> Entrant:
    return _pinned(SDPBackend.FLASH_ATTENTION, case)


def sdpa_cudnn(case: Case) -> Entrant:
    return _pinned(SDPBackend.CUDNN_ATTENTION, case)


def sdpa_padded(case: Case) -> Entrant:
    """Every segment as long as the longest; padded keys are masked. Padding and cropping are not timed."""
    work = _Work.of(case)
    if not work.mask.is_full:
        raise Absent("a padded batch with such a mask is the dense one")
    order, lengths, longest = Raster.of(work.layout), work.lengths, max(work.lengths)
    places = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)]).to(work.layout.device)
    real = torch.zeros(len(lengths) * longest, dtype=torch.bool, device=work.layout.device)
    real[places] = True
    allowed = None if real.all() else real.view(len(lengths), 1, 1, longest)

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(len(real), *x.shape[1:])
        padded[places] = order.pack(x)
        return padded.view(len(lengths), longest, *x.shape[1:])

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)

    return Entrant.peer(case, run, pack=pad, unpack=lambda x: order.unpack(x.flatten(0, 1)[places]))


def varlen(case: Case) -> Entrant:
    """torch.nn.attention.varlen, PyTorch 2.10 and later."""
    work = _Work.of(case).on_gpu_and_full()
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Absent("this PyTorch has none") from error
    offsets, longest = work.layout.cu_seqlens, max(work.lengths)
    return work.in_raster_order(lambda q, k, v: varlen_attn(q, k, v, offsets, offsets, longest, longest))


def flex(case: Case) -> Entrant:
    """Compiled, its BlockMask made before: once a batch, shared by the layers of a model."""
    build, attend = _flex(_Work.of(case))
    blocks = build()
    return _flex_entrant(case, lambda q, k, v: attend(q, k, v, blocks))


def flex_built(case: Case) -> Entrant:
    """Compiled, its BlockMask made at every call."""
    build, attend = _flex(_Work.of(case))
    return _flex_entrant(case, lambda q, k, v: attend(q, k, v, build()))


def _flex_entrant(case: Case, run: Attention) -> Entrant:
    return Entrant.peer(case, run, within=keep_buffers, trains=case.inputs[0].is_cuda)


def _flex(work: _Work) -> tuple[Callable[[], Any], Callable[..., Tensor]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout, on_gpu = work.layout, work.layout.device.type == "cuda"
    segment, coords, size = layout.segment_ids, layout.coords, layout.capacity
    low, high = work.mask.bounds(layout)
    axes = [axis for axis, bound in enumerate((work.mask.t, work.mask.h, work.mask.w)) if bound != (None, None)]

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = segment[query] == segment[key]
        for axis in axes:
            place = coords[key, axis]
            inside = inside & (place >= low[query, axis]) & (place <= high[query, axis])
        return inside

    # Not compiled, it holds a number for every pair of tokens; on a CPU its compilation takes longer than it saves.
    create = torch.compile(create_block_mask) if on_gpu else create_block_mask
    attention = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Tensor:
        return attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=blocks)[0].transpose(0, 1)

    return partial(create, allowed, None, None, size, size, device=layout.device), attend


def flash_attn(case: Case) -> Entrant:
    return _varlen_of("flash_attn", "flash-attn", case)


def flash_attn_3(case: Case) -> Entrant:
    return _varlen_of("flash_attn_interface", "flash-attn 3", case)


def _varlen_of(module: str, name: str, case: Case) -> Entrant:
    found = _imported(module, name)
    work = _Work.of(case).on_gpu_and_full()
    offsets, longest = work.layout.cu_seqlens, max(work.lengths)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = found.flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest)
        return out[0] if isinstance(out, tuple) else out  # the first releases of version 3 give the logsumexp too

    return work.in_raster_order(run)


def xformers(case: Case) -> Entrant:
    ops = _imported("xformers.ops", "xformers")
    work = _Work.of(case).on_gpu_and_full()
    bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(work.lengths)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]

    return work.in_raster_order(run)


def _imported(module: str, name: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise Absent(f"{name} is not installed") from error
