"""unpatchify: every token's row scattered to the pixels of its patch, and gathered back for the gradient."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._launch import launch, next_power_of_two
from sora_fast.kernels._patches import Patches, patch_origins, patch_pixels


@dataclass(frozen=True)
class UnpatchifyConfig:
    """Not measured yet. Pure memory traffic wants many blocks in flight: few addresses a thread, few registers."""

    tokens: int = 32  # neighbours in the pack are neighbours in the video: their short runs of pixels share lines
    pixels: int = 64  # at most; a patch of 1x2x2 with 16 channels has 64
    num_warps: int = 8  # 8 elements a thread


def scatter(tokens: Tensor, patches: Patches, capacity: int) -> Tensor:
    """tokens [N, pt·ph·pw·C], rows laid out (pt, ph, pw, C), any strides → flat [capacity]; zeros elsewhere."""
    flat = torch.zeros(capacity, dtype=tokens.dtype, device=tokens.device)
    _launch(_scatter, tokens, flat, patches)
    return flat


def gather(flat: Tensor, patches: Patches, num_pixels: int) -> Tensor:
    """The transpose of `scatter`: flat [capacity], any stride → [N, num_pixels]; zeros where there is no pixel."""
    tokens = torch.empty(patches.num_tokens, num_pixels, dtype=flat.dtype, device=flat.device)
    _launch(_gather, tokens, flat, patches)
    return tokens


def _launch(kernel: Any, tokens: Tensor, flat: Tensor, patches: Patches) -> None:
    config = UnpatchifyConfig()
    num_pixels = tokens.shape[1]
    block = min(config.pixels, next_power_of_two(num_pixels))
    # One axis: only the first one of a grid is longer than 65,535.
    grid = (triton.cdiv(num_pixels, block) * triton.cdiv(patches.num_tokens, config.tokens),)
    launch(
        *(kernel, grid, tokens, *tokens.stride(), flat, flat.stride(0), flat.numel(), *patches.args),
        **patches.meta(flat.numel()),
        NUM_PIXELS=num_pixels,
        BLOCK_N=config.tokens,
        BLOCK_P=block,
        num_warps=config.num_warps,
    )


@triton.jit
def _scatter(
    tokens, token_stride, pixel_stride, flat, flat_stride, capacity,
    offsets, shapes, segment_ids, coords, num_tokens,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
    NUM_PIXELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, columns, elements, exists = _block(
        offsets, shapes, segment_ids, coords, num_tokens, PT, PH, PW, WIDE, NUM_PIXELS, BLOCK_N, BLOCK_P
    )
    exists &= elements < capacity
    row = tokens + n[:, None].to(tl.int64) * token_stride
    tl.store(flat + elements, tl.load(row + columns[None, :] * pixel_stride, mask=exists), mask=exists)


@triton.jit
def _gather(
    tokens, token_stride, pixel_stride, flat, flat_stride, capacity,
    offsets, shapes, segment_ids, coords, num_tokens,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
    NUM_PIXELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, columns, elements, exists = _block(
        offsets, shapes, segment_ids, coords, num_tokens, PT, PH, PW, WIDE, NUM_PIXELS, BLOCK_N, BLOCK_P
    )
    exists &= elements < capacity
    row = tokens + n[:, None].to(tl.int64) * token_stride
    held = (n < num_tokens)[:, None] & (columns < NUM_PIXELS)[None, :]
    tl.store(row + columns[None, :] * pixel_stride, tl.load(flat + elements * flat_stride, mask=exists, other=0), held)


@triton.jit
def _block(
    offsets, shapes, segment_ids, coords, num_tokens,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
    NUM_PIXELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Tokens [n], the columns [p] of their rows that this program moves, and where those lie in the buffer [n, p].

    Pixels are taken in the buffer's order (c, pt, ph, pw): the reads of a row meet in the cache, writes cannot.
    """
    blocks: tl.constexpr = tl.cdiv(NUM_PIXELS, BLOCK_P)
    n = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    pixels = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    origins = patch_origins(n, offsets, shapes, segment_ids, coords, num_tokens, PT, PH, PW, WIDE)
    elements, exists = patch_pixels(origins, pixels, NUM_PIXELS, PT, PH, PW)
    volume: tl.constexpr = PT * PH * PW
    columns = tl.where(pixels < NUM_PIXELS, pixels % volume * (NUM_PIXELS // volume) + pixels // volume, NUM_PIXELS)
    return n, columns, elements, exists
