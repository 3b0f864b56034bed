"""patch_embed: an implicit GEMM that reads each token's patch straight from the ragged latents."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels import _rows
from sora_fast.kernels._fold import fold
from sora_fast.kernels._launch import cdiv, launch
from sora_fast.kernels._patches import Patches, PatchForm, fitted, load_pixels, patch_columns, patch_origins, patch_runs


@dataclass(frozen=True)
class PatchEmbedConfig:
    """Blocks of the two GEMMs; not measured yet. All are bound by memory until K is in the hundreds."""

    tokens: int = 64  # a wgmma of one warpgroup is 64 rows
    width: int = 128  # divides 1152, 1536, 3072, 5120
    # Up to so many pixels, a program keeps its patches and walks over the channels: pixels are read once, and the
    # chain of loads that finds them (segment, shape, coordinates, pixels) is waited for once.
    held: int = 128
    # Pixels a step of the forward pass, of larger patches: 64 take more than the 128 registers a thread that leave room
    # for two blocks on a multiprocessor, one of which reads while the other multiplies.
    inner: int = 32
    # Programs that the forward pass is cut into where tokens are few, by channels: about four a multiprocessor.
    programs: int = 512
    features: int = 64  # columns of the weights' gradient
    # Tokens a step of it: 116 registers a thread on sm_90, so that two blocks fit on a multiprocessor; 64 take 166.
    step: int = 32
    # Tokens in one partial sum of the weights' gradient. The partials of 64 pixels are an eighth of what is read, and
    # 32k tokens by 1152 channels make 144 programs. The bits do not depend on the GPU.
    chunk: int = 2048
    # Numbers in all partial sums together, 64 MB: with many pixels, which are many programs, chunks are longer.
    most_partials: int = 1 << 24
    num_warps: int = 8
    num_stages: int = 2
    # A thread's: all that there are. The assembler, left to itself, spills a few bytes to stay below 64 or 128.
    most_registers: int = 255

    @staticmethod
    @lru_cache
    def choose(form: PatchForm, width: int) -> "PatchEmbedConfig":
        """Smaller blocks where the usual ones spill: where a number or an address takes twice the registers, and where
        numbers are addressed one by one, as runs that are no vectors are, and rows of no multiple of 16."""
        rows_are_vectors = width % 16 == 0
        if form.dtype == torch.float32 or form.wide:
            runs_are_vectors = form.patch_size[2] % form.run_block == 0
            narrow = not (rows_are_vectors and runs_are_vectors)
            return PatchEmbedConfig(tokens=32, width=32 if narrow else 64, held=32, features=32)
        return PatchEmbedConfig() if rows_are_vectors else PatchEmbedConfig(tokens=32)

    @property
    def options(self) -> dict[str, int]:
        """Of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.most_registers}

    def channels_for(self, num_tokens: int, width: int) -> int:
        """Channels that a program of the forward pass walks over."""
        groups = cdiv(self.programs, max(1, cdiv(num_tokens, self.tokens)))
        return cdiv(cdiv(width, self.width), groups) * self.width

    def chunk_for(self, num_tokens: int, numbers: int) -> int:
        """Tokens in one partial sum of so many numbers: `chunk`, or its first double that keeps to `most_partials`."""
        chunk = self.chunk
        while chunk < num_tokens and cdiv(num_tokens, chunk) * numbers > self.most_partials:
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
    width, num_pixels = weight.shape
    tokens = flat.new_empty(patches.num_tokens, width)
    table = position.table
    form = patches.form(flat)
    config = PatchEmbedConfig.choose(form, width)
    grid, channels, meta = _planned(config, form, patches.num_tokens, width, num_pixels)
    launch(
        *(patch_embed_kernel, grid, flat, flat.stride(0), flat.numel()),
        *(weight, *weight.stride(), bias, 0 if bias is None else bias.stride(0)),
        *(table, *((0, 0) if table is None else table.stride()), *(position.rows or (0, 0, 0))),
        *(tokens, width, channels, *patches.args),
        ROW_A_TOKEN=not position.rows,
        **meta,
    )
    return tokens


@lru_cache
def _planned(
    config: PatchEmbedConfig, form: PatchForm, num_tokens: int, width: int, num_pixels: int
) -> tuple[tuple[int, ...], int, dict[str, Any]]:
    """Of the forward pass: grid, channels that a program walks over, and constants."""
    padded = form.num_runs(num_pixels) * form.run_block
    held = padded <= config.held
    channels = config.channels_for(num_tokens, width) if held else config.width
    # One axis: only the first one of a grid is longer than 65,535.
    grid = (cdiv(width, channels) * cdiv(num_tokens, config.tokens),)
    rows = fitted(config.held if held else config.inner, padded) // form.run_block
    blocks = {"BLOCK_N": config.tokens, "BLOCK_C": config.width, "BLOCK_R": rows}
    return grid, channels, {**form.meta, "NUM_PIXELS": num_pixels, **blocks, **config.options}


def weight_gradient(grad: Tensor, flat: Tensor, patches: Patches, num_pixels: int) -> Tensor:
    """Gradients of the weight [C, K], transposed, and in the last row of the bias: [K + 1, C] fp32. grad: [N, C]."""
    width = grad.shape[1]
    form = patches.form(flat)
    config = PatchEmbedConfig.choose(form, width)
    chunk = config.chunk_for(patches.num_tokens, (num_pixels + 1) * width)
    chunks = cdiv(patches.num_tokens, chunk)
    partials = torch.empty(chunks, num_pixels + 1, width, dtype=torch.float32, device=grad.device)
    padded = form.num_runs(num_pixels) * form.run_block
    block = fitted(config.features, padded)
    grid = (cdiv(width, config.width), cdiv(padded, block), chunks)
    launch(
        *(patch_embed_weight_gradient_kernel, grid, grad, *grad.stride(), flat, flat.stride(0), flat.numel()),
        *(partials, width, *patches.args),
        **form.meta,
        NUM_PIXELS=num_pixels,
        CHUNK=chunk,
        BLOCK_N=config.step,
        BLOCK_C=config.width,
        BLOCK_R=block // form.run_block,
        **config.options,
    )
    return fold(partials)


def table_gradient(grad: Tensor, index: Tensor, offsets: Tensor, order: Tensor) -> Tensor:
    """Gradient of the position tables [L, C]: row l is the sum of `grad` [N, C] over the tokens that took it.

    index [A·N]: the row that each token took of the table of its first axis, then of the second, and so on; −1: none.
    offsets [L+1], order [A·N]: the same, sorted by row.
    """
    num_tokens, width = grad.shape
    rows = offsets.shape[0] - 1
    sums = _rows.Sums.empty(grad, 1, rows, len(index))
    block = _rows.RowBlock.pointwise_backward(width)
    launch(
        patch_embed_table_gradient_kernel,
        (cdiv(len(index), _rows.CHUNK), cdiv(width, block.columns)),
        *(grad, index, offsets, order, sums, num_tokens, len(index), rows, grad.stride()),
        **{"WIDTH": width, "BLOCK_C": block.columns, "CHUNK": _rows.CHUNK},
        num_warps=block.num_warps,
    )
    return _rows.fold(sums, offsets, grad)[0][0]


@triton.jit
def patch_embed_kernel(
    flat, flat_stride, capacity, weight, weight_stride_c, weight_stride_k, bias, bias_stride,
    table, table_stride_row, table_stride_c, t_rows, h_rows, w_rows, tokens, width, channels,
    offsets, shapes, segment_ids, coords, num_tokens,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    NUM_PIXELS: tl.constexpr, ROW_A_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    NUM_RUNS: tl.constexpr = NUM_PIXELS // PW * ((PW + BLOCK_W - 1) // BLOCK_W)
    HELD: tl.constexpr = NUM_RUNS <= BLOCK_R
    # Neighbouring programs differ in the channels: they find the same pixels in the L2.
    groups = tl.cdiv(width, channels)
    n = tl.program_id(0) // groups * BLOCK_N + tl.arange(0, BLOCK_N)
    origins = patch_origins(n, offsets, shapes, segment_ids, coords, num_tokens, PT, PH, PW, WIDE, VECTOR)
    used = origins[7]
    if HELD:
        held = _patch(flat, flat_stride, capacity, origins, 0, NUM_RUNS, PT, PH, PW, VECTOR, BLOCK_N, BLOCK_R, BLOCK_W)
    begin = tl.program_id(0) % groups * channels
    for first_channel in range(begin, tl.minimum(begin + channels, width), BLOCK_C):
        # 64 bits: a weight or a position of any strides, a transposed one of 420k tokens by 5120 channels for example.
        c = (first_channel + tl.arange(0, BLOCK_C)).to(tl.int64)
        exist = c < width
        sums = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for first in range(0, NUM_RUNS, BLOCK_R):
            if HELD:
                patch = held
            else:
                patch = _patch(
                    flat, flat_stride, capacity, origins, first, NUM_RUNS, PT, PH, PW, VECTOR, BLOCK_N, BLOCK_R, BLOCK_W
                )
            pixels, real = patch_columns(first, NUM_RUNS, PW, BLOCK_R, BLOCK_W)
            place = weight + c[None, :] * weight_stride_c + pixels.to(tl.int64)[:, None] * weight_stride_k
            weights = tl.load(place, mask=real[:, None] & exist[None, :], other=0.0)
            sums = tl.dot(patch, weights, sums, input_precision="ieee")
        if bias is not None:
            sums += tl.load(bias + c * bias_stride, mask=exist, other=0.0).to(tl.float32)[None, :]
        if table is not None:
            columns = c * table_stride_c
            if ROW_A_TOKEN:
                sums += _table_rows(table, n, used, table_stride_row, columns, exist)
            else:
                t, h, w = _hot_rows(n, used, coords, t_rows, h_rows, w_rows)
                sums += _table_rows(table, t, used & (t >= 0), table_stride_row, columns, exist)
                sums += _table_rows(table, h, used & (h >= 0), table_stride_row, columns, exist)
                sums += _table_rows(table, w, used & (w >= 0), table_stride_row, columns, exist)
        place = tokens + n[:, None].to(tl.int64) * width + c[None, :]
        # Not a product: what stands in for padding is zero, whatever the sums hold.
        values = tl.where(used[:, None], sums, 0.0).to(tokens.dtype.element_ty)
        tl.store(place, values, mask=(n < num_tokens)[:, None] & exist[None, :])


@triton.jit
def _patch(
    flat, flat_stride, capacity, origins, first, NUM_RUNS: tl.constexpr,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Pixels [n, p] of the runs from `first` on."""
    run = first + tl.arange(0, BLOCK_R)
    runs = patch_runs(run, run < NUM_RUNS, PT, PH, PW, BLOCK_W)
    pixels = load_pixels(flat, flat_stride, capacity, origins, runs, PW, VECTOR, BLOCK_W)
    patch = tl.reshape(tl.permute(pixels, (1, 0, 2)), [BLOCK_N, BLOCK_R * BLOCK_W])
    # They are zeros already. But for sm_100, Triton 3.7 fails to put a tensor that is fresh from a reshape into the
    # shared memory of a product.
    return tl.where(origins[7][:, None], patch, 0.0)


@triton.jit
def _hot_rows(n, used, coords, t_rows, h_rows, w_rows):
    """The row of each of the three tables, one after the other, that a token takes; −1: the table is empty."""
    place = coords + n.to(tl.int64) * 3
    t = tl.minimum(tl.load(place, mask=used, other=0), t_rows - 1)
    h = tl.minimum(tl.load(place + 1, mask=used, other=0), h_rows - 1)
    w = tl.minimum(tl.load(place + 2, mask=used, other=0), w_rows - 1)
    return t, tl.where(h < 0, -1, t_rows + h), tl.where(w < 0, -1, t_rows + h_rows + w)


@triton.jit
def _table_rows(table, rows, wanted, row_stride, columns, exist):
    place = table + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    return tl.load(place, mask=wanted[:, None] & exist[None, :], other=0.0).to(tl.float32)


@triton.jit
def patch_embed_weight_gradient_kernel(
    grad, grad_stride_n, grad_stride_c, flat, flat_stride, capacity, partials, width,
    offsets, shapes, segment_ids, coords, num_tokens,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    NUM_PIXELS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    NUM_RUNS: tl.constexpr = NUM_PIXELS // PW * ((PW + BLOCK_W - 1) // BLOCK_W)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_run = tl.program_id(1) * BLOCK_R
    chunk = tl.program_id(2)
    exist = c < width
    sums = tl.zeros([BLOCK_R * BLOCK_W, BLOCK_C], tl.float32)
    totals = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(chunk * CHUNK, tl.minimum(num_tokens, (chunk + 1) * CHUNK), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        origins = patch_origins(n, offsets, shapes, segment_ids, coords, num_tokens, PT, PH, PW, WIDE, VECTOR)
        patch = _patch(
            flat, flat_stride, capacity, origins, first_run, NUM_RUNS, PT, PH, PW, VECTOR, BLOCK_N, BLOCK_R, BLOCK_W
        )
        place = grad + n[:, None].to(tl.int64) * grad_stride_n + c[None, :].to(tl.int64) * grad_stride_c
        grads = tl.load(place, mask=origins[7][:, None] & exist[None, :], other=0.0)
        sums = tl.dot(tl.trans(patch), grads, sums, input_precision="ieee")
        totals += grads.to(tl.float32)
    pixels, real = patch_columns(first_run, NUM_RUNS, PW, BLOCK_R, BLOCK_W)
    partials += chunk.to(tl.int64) * (NUM_PIXELS + 1) * width + c
    tl.store(partials[None, :] + pixels[:, None] * width, sums, mask=real[:, None] & exist[None, :])
    # The bias is the weight of a feature that is always one; the programs of the first features add it up.
    tl.store(partials + NUM_PIXELS * width, tl.sum(totals, axis=0), mask=exist & (first_run == 0))


@triton.jit
def patch_embed_table_gradient_kernel(
    grad, index, offsets, order, sums, num_tokens, places, rows, grad_strides,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < WIDTH
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    begin, middle, _ = _rows.walk(offsets, rows, places, CHUNK)
    for position in range(begin, middle):
        place = tl.load(order + position)
        row = tl.load(index + place)
        total += _rows.load_fp32(grad, grad_strides, place % num_tokens, column, inside)
        if position + 1 == tl.minimum(middle, tl.load(offsets + row + 1)):
            _rows.store_sums(sums, ((total,),), None, None, None, None, offsets, row, rows, (column,), WIDTH, CHUNK)
            total = tl.zeros([BLOCK_C], dtype=tl.float32)
