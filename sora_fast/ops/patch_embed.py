"""patch_embed: ragged latents to packed tokens, each a linear map of its patch plus a position."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast.ops import _patches_compiled, _patches_torch
from sora_fast.ops._checks import FLOAT_DTYPES, check_device, check_dtype, check_shape, may_read, once
from sora_fast.ops._dispatch import choose
from sora_fast.ops._modulation import parts, widened
from sora_fast.ops._op import kernels, op
from sora_fast.ops._patches import PatchSize, check_grids, check_order, geometry, offered_patches, reordered
from sora_fast.packing import PackedLayout, RaggedLatents, RowIndex
from sora_fast.packing._bundle import TensorBundle


@dataclass(frozen=True, eq=False)
class FactorisedPosition(TensorBundle):
    """A position that is the sum of one row a coordinate: t[t] + h[h] + w[w] (NaViT, arXiv:2307.06304).

    t [Lt, C], h [Lh, C], w [Lw, C]: tables, learned or fixed; None adds nothing for that axis. A coordinate past the
    end of its table is an error on a CPU; elsewhere and in a compiled graph, which do not look, it takes the last row.
    """

    t: Tensor | None = None
    h: Tensor | None = None
    w: Tensor | None = None

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The tables in the order of the axes."""
        return self.t, self.h, self.w

    @staticmethod
    def sin_cos(width: int, height_rows: int, width_rows: int) -> "FactorisedPosition":
        """DiT's fixed positions (arXiv:2212.09748): the first half of the channels encodes the column, the second the
        row, each [sin | cos] with frequencies 10000^(−k / (C/4)), computed in fp64, returned in fp32.

        width: C, a multiple of 4; height_rows, width_rows: the largest grid H, W that the tables cover.
        """
        if width % 4:
            raise ValueError(f"width: {width}; it must be a multiple of 4")
        frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))

        def encode(rows: int) -> Tensor:
            angle = torch.arange(rows, dtype=torch.float64)[:, None] * frequency
            return torch.cat([angle.sin(), angle.cos()], dim=1).float()

        row, column = encode(height_rows), encode(width_rows)
        return FactorisedPosition(
            h=torch.cat([torch.zeros_like(row), row], dim=1), w=torch.cat([column, torch.zeros_like(column)], dim=1)
        )


Position = Tensor | FactorisedPosition | None


def patch_embed(
    latents: RaggedLatents,
    weight: Tensor,
    bias: Tensor | None,
    layout: PackedLayout,
    patch_size: PatchSize,
    position: Position = None,
    *,
    order: str = "cthw",
    backend: str | None = None,
) -> Tensor:
    """Embed every token's patch of pixels: patch · weightᵀ + bias + position.

    latents: videos (C, T, H, W); sizes that the patch does not divide read zeros beyond the edge. Only the pixels of
        the layout's tokens are read, in the layout's order.
    weight: [width, Cin·pt·ph·pw], each row laid out as `order` says.
    order: "cthw": (Cin, pt, ph, pw), a Conv3d kernel, flattened; "thwc": (pt, ph, pw, Cin); "hwtc": (ph, pw, pt, Cin).
        On every backend the weight is put into the first of these before the product: a copy of the weight, where the
        order is another.
    bias: [width] or None. position: [N, width], a FactorisedPosition, or None.
    All of one dtype (bf16, fp16, fp32; fp64 on all backends but Triton). Returns [N, width] in it; zeros for padding.
    Differentiable in latents.flat, weight, bias and position.
    """
    if not isinstance(latents, RaggedLatents):
        raise TypeError(f"latents: {type(latents).__name__}; it must be RaggedLatents")
    check_grids(latents.shapes, layout, patch_size)
    check_order(order)
    # Its tensors: in every step of a sampler latents are another bundle of them.
    _check(latents.flat, latents.offsets, weight, bias, layout, patch_size)
    _check_videos(latents, weight, patch_size)
    weight = reordered(weight, 1, patch_size, order, "cthw")
    if position is not None:
        _check_position(position, weight, layout)
    chosen = choose("patch_embed", backend, weight.device, offered_patches(weight), weight.dtype)
    if chosen != "triton":
        cut = (_patches_torch if chosen == "torch" else _patches_compiled).cut
        patches = cut(latents.flat, latents.offsets, latents.shapes, layout, patch_size, _channels(weight, patch_size))
        return _embedded(patches, weight, bias, layout, position)
    places = geometry(latents.offsets, latents.shapes, layout, patch_size)
    return _patch_embed(latents.flat, weight, bias, *_joined(position), *places)


def _channels(weight: Tensor, patch_size: PatchSize) -> int:
    return weight.shape[1] // math.prod(patch_size)


def _embedded(patches: Tensor, weight: Tensor, bias: Tensor | None, layout: PackedLayout, position: Position) -> Tensor:
    """What is left to do once patches are rows [N, K]."""
    tokens = _patches_torch.linear(patches, weight, bias, layout)
    if position is None:
        return tokens
    if isinstance(position, FactorisedPosition):
        for axis, table in enumerate(position.tables):
            if table is not None:
                # Widened, so that the gradients of its rows are not added up in 16 bits.
                tokens = tokens + F.embedding(layout.coords[:, axis].clamp(max=table.shape[0] - 1), widened(table))
    else:
        tokens = tokens + position
    return torch.where((layout.segment_ids >= 0)[:, None], tokens, 0).to(weight.dtype)


def _joined(position: Position) -> tuple[Tensor | None, list[int]]:
    """One table for the kernels, and how many rows of it belong to t, h and w; none: row n is token n's."""
    if not isinstance(position, FactorisedPosition):
        return position, []
    tables = [table for table in position.tables if table is not None]
    if not tables:
        return None, []
    return torch.cat(tables), [0 if table is None else table.shape[0] for table in position.tables]


@op("sora_fast::patch_embed")
def _patch_embed(
    flat: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    table_rows: list[int],
    offsets: Tensor,
    shapes: Tensor,
    segment_ids: Tensor,
    coords: Tensor,
    patch_size: list[int],
) -> Tensor:
    own = kernels("patch_embed")
    patches = kernels("_patches").Patches(offsets, shapes, segment_ids, coords, tuple(patch_size))
    return own.embed(flat, weight, bias, patches, own.Additive(table, tuple(table_rows)))


@op("sora_fast::patch_embed_weight_gradient")
def _weight_gradient(
    grad: Tensor,
    flat: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    segment_ids: Tensor,
    coords: Tensor,
    patch_size: list[int],
    num_pixels: int,
) -> Tensor:
    """[K + 1, width] fp32: the weight's gradient, transposed, then the bias's."""
    patches = kernels("_patches").Patches(offsets, shapes, segment_ids, coords, tuple(patch_size))
    return kernels("patch_embed").weight_gradient(grad, flat, patches, num_pixels)


@op("sora_fast::patch_embed_table_gradient")
def _table_gradient(grad: Tensor, index: Tensor, offsets: Tensor, order: Tensor) -> Tensor:
    return kernels("patch_embed").table_gradient(grad, index, offsets, order)


@op("sora_fast::patch_embed_pixel_gradient")
def _pixel_gradient(
    grad: Tensor,
    weight: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    segment_ids: Tensor,
    coords: Tensor,
    patch_size: list[int],
    elements: int,
) -> Tensor:
    patches = kernels("_patches").Patches(offsets, shapes, segment_ids, coords, tuple(patch_size))
    return kernels("linear_unpatchify").scatter_product(grad, weight.t(), None, patches, elements, channel_last=False)


@_patch_embed.register_fake
def _(flat: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    segment_ids = rest[5]
    return flat.new_empty(segment_ids.shape[0], weight.shape[0])


@_weight_gradient.register_fake
def _(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(rest[-1] + 1, grad.shape[1], dtype=torch.float32)


@_table_gradient.register_fake
def _(grad: Tensor, index: Tensor, offsets: Tensor, order: Tensor) -> Tensor:
    return grad.new_empty(offsets.shape[0] - 1, grad.shape[1])


@_pixel_gradient.register_fake
def _(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    flat, weight, _, _, ctx.table_rows, *geometry, ctx.patch_size = inputs
    ctx.save_for_backward(flat, weight, *geometry)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    flat, weight, *geometry = ctx.saved_tensors
    needs_flat, needs_weight, needs_bias, needs_table = ctx.needs_input_grad[:4]
    d_flat = d_weight = d_bias = d_table = None
    if needs_flat:
        d_flat = _pixel_gradient(grad, weight, *geometry, ctx.patch_size, flat.shape[0])
    if needs_weight or needs_bias:
        sums = _weight_gradient(grad, flat, *geometry, ctx.patch_size, weight.shape[1]).to(weight.dtype)
        d_weight = sums[:-1].T if needs_weight else None
        d_bias = sums[-1] if needs_bias else None
    if needs_table and ctx.table_rows:
        d_table = _table_gradient(grad, *parts(_rows_taken(*geometry[2:], ctx.table_rows)))
    elif needs_table:
        d_table = torch.where((geometry[2] >= 0)[:, None], grad, 0)
    return d_flat, d_weight, d_bias, d_table, *[None] * 6


def _rows_taken(segment_ids: Tensor, coords: Tensor, table_rows: list[int]) -> RowIndex:
    """The row of the joint table that every token took, for all axes with rows, one after the other: [axes · N]."""
    taken, first = [], 0
    for axis, rows in enumerate(table_rows):
        if rows:
            row = coords[:, axis].clamp(max=rows - 1) + first
            taken.append(torch.where(segment_ids >= 0, row, -1))
        first += rows
    return RowIndex.from_index(torch.cat(taken), first)


_patch_embed.register_autograd(_backward, setup_context=_save)


@once
def _check(
    flat: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: PackedLayout,
    patch_size: PatchSize,
) -> None:
    pixels = math.prod(patch_size)
    check_shape("weight", weight, ["width", f"Cin·{pixels}"])
    if weight.shape[1] % pixels or weight.numel() == 0:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)}; it must be [width, Cin·{pixels}] for patches of {tuple(patch_size)}"
        )
    check_dtype("weight", weight, FLOAT_DTYPES)
    check_shape("latents.flat", flat, ["elements"])
    _check_like_weight("latents.flat", flat, weight)
    check_shape("latents.offsets", offsets, [layout.max_segments + 1])
    check_dtype("latents.offsets", offsets, [torch.int64])
    check_device("latents.offsets", offsets, "weight", weight.device)
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1])
        _check_like_weight("bias", bias, weight)
    check_device("weight", weight, "the layout", layout.device)


def _check_videos(latents: RaggedLatents, weight: Tensor, patch_size: PatchSize) -> None:
    """Their channels and their elements, where looking costs nothing."""
    if not may_read(latents.shapes):
        return
    channels = _channels(weight, patch_size)
    others = {shape[0] for shape in latents.shapes.tolist() if math.prod(shape[1:])} - {channels}
    if others:
        raise ValueError(
            f"latents: a video of {others.pop()} channels, but weight {tuple(weight.shape)} takes {channels}"
        )
    if latents.offsets[-1] > latents.flat.shape[0]:
        raise ValueError(
            f"latents.flat: {latents.flat.shape[0]} elements, but the videos have {int(latents.offsets[-1])}"
        )


def _check_position(position: Tensor | FactorisedPosition, weight: Tensor, layout: PackedLayout) -> None:
    width = weight.shape[0]
    if not isinstance(position, FactorisedPosition):
        check_shape("position", position, [layout.capacity, width])
        _check_like_weight("position", position, weight)
        return
    for axis, table in enumerate(position.tables):
        if table is None:
            continue
        name = f"position.{'thw'[axis]}"
        check_shape(name, table, ["L", width])
        _check_like_weight(name, table, weight)
        rows, coords = table.shape[0], layout.coords[:, axis]
        if rows == 0 or (may_read(coords) and len(coords) and coords.max() >= rows):
            raise ValueError(
                f"{name}: {rows} rows; it must have one for every coordinate of the layout, and at least 1"
            )


def _check_like_weight(name: str, tensor: Tensor, weight: Tensor) -> None:
    check_dtype(name, tensor, [weight.dtype])
    check_device(name, tensor, "weight", weight.device)
