"""unpatchify: every token's row scattered to the pixels of its patch, and gathered back for the gradient."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._launch import cdiv, launch, next_power_of_two
from sora_fast.kernels._patches import Patches, PatchForm, load_pixels, patch_origins, patch_runs, store_pixels


@dataclass(frozen=True)
class UnpatchifyConfig:
    """Not measured yet. A block is read in one order and written in the other, through shared memory.

    Of a row it takes `row` elements at the most, so that the rest are tokens, whose runs of pixels lie side by side.
    """

    elements: int = 4096  # 16 a thread: in bf16 two loads of 16 bytes of a row, eight stores of two pixels each
    row: int = 128  # 256 bytes of a row: whole cache lines
    channels: int = 16  # 32 bytes of a row for each pixel, a sector
    tokens: int = 1024  # at most: what finds a token's pixels is seven numbers a token
    num_warps: int = 8


def scatter(tokens: Tensor, patches: Patches, capacity: int, order: str) -> Tensor:
    """tokens [N, pt·ph·pw·C], any strides, rows laid out in `order`: "thwc", (pt, ph, pw, C), "cthw" or "hwtc" → flat
    [capacity]; zeros elsewhere."""
    flat = tokens.new_zeros(capacity)
    _launch(unpatchify_scatter_kernel, tokens, flat, patches, order)
    return flat


def gather(flat: Tensor, patches: Patches, num_pixels: int, order: str) -> Tensor:
    """The transpose of `scatter`: flat [capacity], any stride → [N, num_pixels]; zeros where there is no pixel."""
    tokens = torch.empty(patches.num_tokens, num_pixels, dtype=flat.dtype, device=flat.device)
    _launch(unpatchify_gather_kernel, tokens, flat, patches, order)
    return tokens


def _launch(kernel: Any, tokens: Tensor, flat: Tensor, patches: Patches, order: str) -> None:
    grid, meta = _planned(patches.form(flat), patches.num_tokens, tokens.shape[1], order)
    places = (flat, flat.stride(0), flat.numel(), *patches.args)
    launch(kernel, grid, tokens, *tokens.stride(), *places, **meta)


@lru_cache
def _planned(form: PatchForm, num_tokens: int, num_pixels: int, order: str) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Grid and constants."""
    config = UnpatchifyConfig()
    channels = num_pixels // math.prod(form.patch_size)
    runs = form.num_runs(num_pixels) // channels  # of one channel
    block_c = min(config.channels, next_power_of_two(channels))
    block_q = min(next_power_of_two(runs), max(1, config.row // (block_c * form.run_block)))
    block_n = min(config.tokens, config.elements // (block_c * block_q * form.run_block))
    blocks = {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_Q": block_q}
    # One axis: only the first one of a grid is longer than 65,535.
    programs = cdiv(channels, block_c) * cdiv(runs, block_q) * cdiv(num_tokens, block_n)
    return (programs,), {**form.meta, "CHANNELS": channels, "ORDER": order, **blocks, "num_warps": config.num_warps}


@triton.jit
def unpatchify_scatter_kernel(
    tokens, token_stride, pixel_stride, flat, flat_stride, capacity,
    offsets, shapes, segment_ids, coords, num_tokens,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS: tl.constexpr, ORDER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    n, columns, real, runs = _block(PT, PH, PW, CHANNELS, ORDER, BLOCK_N, BLOCK_C, BLOCK_Q, BLOCK_W)
    origins = patch_origins(n, offsets, shapes, segment_ids, coords, num_tokens, PT, PH, PW, WIDE, VECTOR)
    place = tokens + n.to(tl.int64)[:, None, None, None] * token_stride + columns * pixel_stride
    rows = tl.load(place, mask=origins[7][:, None, None, None] & real, other=0.0)
    pixels = tl.reshape(tl.permute(rows, (3, 1, 0, 2)), [BLOCK_C * BLOCK_Q, BLOCK_N, BLOCK_W])
    store_pixels(flat, capacity, pixels, origins, runs, PW, VECTOR, BLOCK_W)


@triton.jit
def unpatchify_gather_kernel(
    tokens, token_stride, pixel_stride, flat, flat_stride, capacity,
    offsets, shapes, segment_ids, coords, num_tokens,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS: tl.constexpr, ORDER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    n, columns, real, runs = _block(PT, PH, PW, CHANNELS, ORDER, BLOCK_N, BLOCK_C, BLOCK_Q, BLOCK_W)
    origins = patch_origins(n, offsets, shapes, segment_ids, coords, num_tokens, PT, PH, PW, WIDE, VECTOR)
    pixels = load_pixels(flat, flat_stride, capacity, origins, runs, PW, VECTOR, BLOCK_W)
    rows = tl.permute(tl.reshape(pixels, [BLOCK_C, BLOCK_Q, BLOCK_N, BLOCK_W]), (2, 1, 3, 0))
    place = tokens + n.to(tl.int64)[:, None, None, None] * token_stride + columns * pixel_stride
    tl.store(place, rows, mask=(n < num_tokens)[:, None, None, None] & real)


@triton.jit
def _block(
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, CHANNELS: tl.constexpr, ORDER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """What this program moves: tokens [n]; columns of their rows [1, q, w, c], and which exist; the same as runs
    [c · q]. q numbers the runs of one channel."""
    PIECES: tl.constexpr = (PW + BLOCK_W - 1) // BLOCK_W
    RUNS: tl.constexpr = PT * PH * PIECES
    steps: tl.constexpr = (RUNS + BLOCK_Q - 1) // BLOCK_Q
    parts: tl.constexpr = ((CHANNELS + BLOCK_C - 1) // BLOCK_C) * steps
    n = tl.program_id(0) // parts * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(0) % parts
    first_c, first_q = part // steps * BLOCK_C, part % steps * BLOCK_Q
    q = (first_q + tl.arange(0, BLOCK_Q))[None, :, None, None]
    w = q % PIECES * BLOCK_W + tl.arange(0, BLOCK_W)[None, None, :, None]
    c = (first_c + tl.arange(0, BLOCK_C))[None, None, None, :]
    if ORDER == "thwc":
        columns = (q // PIECES * PW + w) * CHANNELS + c
    elif ORDER == "cthw":
        columns = c * (PT * PH * PW) + (q // PIECES * PW + w)
    else:
        columns = ((q // PIECES % PH * PW + w) * PT + q // PIECES // PH) * CHANNELS + c
    real = (q < RUNS) & (w < PW) & (c < CHANNELS)
    block = tl.arange(0, BLOCK_C * BLOCK_Q)
    channel, run = first_c + block // BLOCK_Q, first_q + block % BLOCK_Q
    exist = (channel < CHANNELS) & (run < RUNS)
    return n, columns.to(tl.int64), real, patch_runs(channel * RUNS + run, exist, PT, PH, PW, BLOCK_W)
