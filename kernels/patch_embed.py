"""patch_embed: an implicit GEMM that reads each token's patch straight from the ragged latents."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._fold import fold
from sora_fast.kernels._launch import launch, next_power_of_two
from sora_fast.kernels._patches import Patches, patch_origins, patch_pixels


@dataclass(frozen=True)
class PatchEmbedConfig:
    """Blocks of the three GEMMs; not measured yet. All are bound by memory until K is in the hundreds."""

    tokens: int = 64  # a wgmma of one warpgroup is 64 rows
    width: int = 128  # divides 1152, 1536, 3072, 5120
    # Pixels a step of the forward pass, channels a step of the pixels' gradient. With 64, the addresses of a block of
    # pixels take so many registers that they spill.
    inner: int = 32
    features: int = 64  # columns of both gradients
    # Tokens in one partial sum of the weights' gradient: long enough that the partials are small beside the tokens,
    # short enough that 32k tokens give 8 of them. The bits do not depend on the GPU.
    chunk: int = 4096
    # Numbers in all partial sums together, 64 MB: with position tables, which are many columns and so many programs,
    # chunks are longer.
    most_partials: int = 1 << 24
    num_warps: int = 8  # with 4, the addresses spill
    num_stages: int = 2  # pixels come through registers, only the weights are copied ahead

    @staticmethod
    def choose(dtype: torch.dtype, patches: Patches, elements: int) -> "PatchEmbedConfig":
        """Smaller blocks where a number or an address takes twice the registers: the usual ones spill there."""
        if dtype == torch.float32:
            return PatchEmbedConfig(tokens=32, width=64, features=32)
        if patches.is_wide(elements):
            return PatchEmbedConfig(tokens=32, width=64, features=32, num_warps=4)
        return PatchEmbedConfig()

    def chunk_for(self, num_tokens: int, numbers: int) -> int:
        """Tokens in one partial sum of so many numbers: `chunk`, or its first double that keeps to `most_partials`."""
        chunk = self.chunk
        while chunk < num_tokens and triton.cdiv(num_tokens, chunk) * numbers > self.most_partials:
            chunk *= 2
        return chunk


@dataclass(frozen=True)
class Additive:
    """What is added to the tokens: rows of `table` [L, C], chosen by the token, or by each of its coordinates.

    rows: how many rows belong to t, to h and to w, one after the other; empty: row n is token n's.
    """

    table: Tensor | None
    rows: tuple[int, ...]


def embed(flat: Tensor, weight: Tensor, bias: Tensor | None, patches: Patches, position: Additive) -> Tensor:
    """flat [elements], weight [C, K], bias [C] → tokens [N, C], zeros for padding."""
    config = PatchEmbedConfig.choose(flat.dtype, patches, _reach(flat))
    width, num_pixels = weight.shape
    tokens = torch.empty(patches.num_tokens, width, dtype=flat.dtype, device=flat.device)
    table = position.table
    # One axis: only the first one of a grid is longer than 65,535.
    grid = (triton.cdiv(width, config.width) * triton.cdiv(patches.num_tokens, config.tokens),)
    launch(
        *(_embed, grid, flat, flat.stride(0), weight, *weight.stride(), bias, 0 if bias is None else bias.stride(0)),
        *(table, *((0, 0) if table is None else table.stride()), *(position.rows or (0, 0, 0))),
        *(tokens, width, *patches.args),
        **patches.meta(_reach(flat)),
        NUM_PIXELS=num_pixels,
        ROW_A_TOKEN=not position.rows,
        BLOCK_N=config.tokens,
        BLOCK_C=config.width,
        BLOCK_K=_fitted(config.inner, num_pixels),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return tokens


def weight_gradient(grad: Tensor, flat: Tensor, patches: Patches, num_pixels: int, rows: tuple[int, ...]) -> Tensor:
    """Gradients of all that maps a token's features to its channels: [C, K + Lt + Lh + Lw + 1] fp32.

    Bias and position tables are weights too, of features that are one: always, and where the coordinate is the row's.
    Columns: the weight's, then those of the three tables, then the bias's. grad: [N, C]; rows: as in `Additive`.
    """
    config = PatchEmbedConfig.choose(flat.dtype, patches, _reach(flat))
    width, features = grad.shape[1], num_pixels + sum(rows) + 1
    chunk = config.chunk_for(patches.num_tokens, width * features)
    chunks = triton.cdiv(patches.num_tokens, chunk)
    partials = torch.empty(chunks, width, features, dtype=torch.float32, device=grad.device)
    block = _fitted(config.features, features)
    grid = (triton.cdiv(width, config.features), triton.cdiv(features, block), chunks)
    launch(
        *(
            _weight_gradient,
            grid,
            grad,
            *grad.stride(),
            flat,
            flat.stride(0),
            partials,
            width,
            features,
            *(rows or (0, 0, 0)),
        ),
        *patches.args,
        **patches.meta(_reach(flat)),
        NUM_PIXELS=num_pixels,
        CHUNK=chunk,
        BLOCK_N=config.tokens,
        BLOCK_C=config.features,
        BLOCK_F=block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return fold(partials)


def pixel_gradient(grad: Tensor, weight: Tensor, patches: Patches, elements: int) -> Tensor:
    """Gradient of flat [elements]: grad [N, C] · weight [C, K], each pixel to its place; zeros elsewhere."""
    config = PatchEmbedConfig.choose(grad.dtype, patches, elements)
    width, num_pixels = weight.shape
    flat = torch.zeros(elements, dtype=grad.dtype, device=grad.device)
    block = _fitted(config.features, num_pixels)
    grid = (triton.cdiv(num_pixels, block) * triton.cdiv(patches.num_tokens, config.tokens),)
    launch(
        *(_pixel_gradient, grid, grad, *grad.stride(), weight, *weight.stride(), flat, width, *patches.args),
        **patches.meta(elements),
        NUM_PIXELS=num_pixels,
        BLOCK_N=config.tokens,
        BLOCK_C=config.inner,
        BLOCK_P=block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return flat


def _reach(flat: Tensor) -> int:
    """How far a kernel's offsets into `flat` go; the buffer may be strided."""
    return flat.numel() * max(1, flat.stride(0))


def _fitted(block: int, size: int) -> int:
    """No larger than needed, no smaller than the 16 that a matrix instruction takes."""
    return min(block, max(16, next_power_of_two(size)))


@triton.jit
def _embed(
    flat, flat_stride, weight, weight_stride_c, weight_stride_k, bias, bias_stride,
    table, table_stride_row, table_stride_c, t_rows, h_rows, w_rows, tokens, width,
    offsets, shapes, segment_ids, coords, num_tokens,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
    NUM_PIXELS: tl.constexpr, ROW_A_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs differ in the channels: they find the same pixels in the L2.
    blocks = tl.cdiv(width, BLOCK_C)
    n = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    held = c < width
    columns = c.to(tl.int64)
    origins = patch_origins(n, offsets, shapes, segment_ids, coords, num_tokens, PT, PH, PW, WIDE)
    sums = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, NUM_PIXELS, BLOCK_K):
        pixels = first + tl.arange(0, BLOCK_K)
        elements, exists = patch_pixels(origins, pixels, NUM_PIXELS, PT, PH, PW)
        patch = tl.load(flat + elements * flat_stride, mask=exists, other=0.0)
        weights = tl.load(
            weight + columns[None, :] * weight_stride_c + pixels[:, None] * weight_stride_k,
            mask=(pixels < NUM_PIXELS)[:, None] & held[None, :],
            other=0.0,
        )
        sums = tl.dot(patch, weights, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + columns * bias_stride, mask=held, other=0.0).to(tl.float32)[None, :]
    used = tl.load(segment_ids + n, mask=n < num_tokens, other=-1) >= 0
    if table is not None:
        columns *= table_stride_c
        if ROW_A_TOKEN:
            sums += _table_rows(table, n, used, table_stride_row, columns, held)
        else:
            t, h, w = _hot_rows(n, used, coords, t_rows, h_rows, w_rows)
            sums += _table_rows(table, t, used & (t >= 0), table_stride_row, columns, held)
            sums += _table_rows(table, h, used & (h >= 0), table_stride_row, columns, held)
            sums += _table_rows(table, w, used & (w >= 0), table_stride_row, columns, held)
    place = tokens + n[:, None].to(tl.int64) * width + c[None, :]
    # Not a product: what stands in for padding is zero, whatever the sums hold.
    values = tl.where(used[:, None], sums, 0.0).to(tokens.dtype.element_ty)
    tl.store(place, values, mask=(n < num_tokens)[:, None] & held[None, :])


@triton.jit
def _hot_rows(n, used, coords, t_rows, h_rows, w_rows):
    """The row of each of the three tables, one after the other, that a token takes; −1: the table is empty."""
    place = coords + n.to(tl.int64) * 3
    t = tl.minimum(tl.load(place, mask=used, other=0), t_rows - 1)
    h = tl.minimum(tl.load(place + 1, mask=used, other=0), h_rows - 1)
    w = tl.minimum(tl.load(place + 2, mask=used, other=0), w_rows - 1)
    return t, tl.where(h < 0, -1, t_rows + h), tl.where(w < 0, -1, t_rows + h_rows + w)


@triton.jit
def _table_rows(table, rows, wanted, row_stride, columns, held):
    place = table + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    return tl.load(place, mask=wanted[:, None] & held[None, :], other=0.0).to(tl.float32)


@triton.jit
def _weight_gradient(
    grad, grad_stride_n, grad_stride_c, flat, flat_stride, partials, width, num_features, t_rows, h_rows, w_rows,
    offsets, shapes, segment_ids, coords, num_tokens,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
    NUM_PIXELS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    features = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    chunk = tl.program_id(2)
    held = c < width
    row = features - NUM_PIXELS
    is_bias = features == num_features - 1
    sums = tl.zeros([BLOCK_C, BLOCK_F], tl.float32)
    for first in range(chunk * CHUNK, tl.minimum(num_tokens, (chunk + 1) * CHUNK), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        origins = patch_origins(n, offsets, shapes, segment_ids, coords, num_tokens, PT, PH, PW, WIDE)
        used = origins[0]
        elements, exists = patch_pixels(origins, features, NUM_PIXELS, PT, PH, PW)
        values = tl.load(flat + elements * flat_stride, mask=exists, other=0.0)
        t, h, w = _hot_rows(n, used, coords, t_rows, h_rows, w_rows)
        hot = (row[None, :] == t[:, None]) | (row[None, :] == h[:, None]) | (row[None, :] == w[:, None])
        hot = (hot & (row >= 0)[None, :]) | is_bias[None, :]
        values = tl.where(hot, 1.0, values.to(tl.float32)).to(values.dtype)
        grads = tl.load(
            grad + n[None, :].to(tl.int64) * grad_stride_n + c[:, None].to(tl.int64) * grad_stride_c,
            mask=used[None, :] & held[:, None],
            other=0.0,
        )
        sums = tl.dot(grads, values, sums, input_precision="ieee")
    place = (chunk.to(tl.int64) * width + c[:, None]) * num_features + features[None, :]
    tl.store(partials + place, sums, mask=held[:, None] & (features < num_features)[None, :])


@triton.jit
def _pixel_gradient(
    grad, grad_stride_n, grad_stride_c, weight, weight_stride_c, weight_stride_k, flat, width,
    offsets, shapes, segment_ids, coords, num_tokens,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
    NUM_PIXELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = tl.cdiv(NUM_PIXELS, BLOCK_P)
    n = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    pixels = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    origins = patch_origins(n, offsets, shapes, segment_ids, coords, num_tokens, PT, PH, PW, WIDE)
    used = origins[0]
    sums = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for first in range(0, width, BLOCK_C):
        c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
        grads = tl.load(
            grad + n[:, None].to(tl.int64) * grad_stride_n + c[None, :] * grad_stride_c,
            mask=used[:, None] & (c < width)[None, :],
            other=0.0,
        )
        weights = tl.load(
            weight + c[:, None] * weight_stride_c + pixels[None, :] * weight_stride_k,
            mask=(c < width)[:, None] & (pixels < NUM_PIXELS)[None, :],
            other=0.0,
        )
        sums = tl.dot(grads, weights, sums, input_precision="ieee")
    elements, exists = patch_pixels(origins, pixels, NUM_PIXELS, PT, PH, PW)
    # A pixel belongs to one token at the most: plain stores.
    tl.store(flat + elements, sums.to(flat.dtype.element_ty), mask=exists)
