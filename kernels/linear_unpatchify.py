"""linear_unpatchify: a matrix product whose columns are pixels, written to their places as it is made."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._launch import cdiv, launch
from sora_fast.kernels._patches import (
    Patches,
    PatchForm,
    fitted,
    patch_columns,
    patch_origins,
    patch_runs,
    store_pixels,
)


@dataclass(frozen=True)
class LinearUnpatchifyConfig:
    """Not measured yet. Bound by the read of x until a patch has hundreds of pixels."""

    tokens: int = 64  # a wgmma of one warpgroup is 64 rows
    pixels: int = 64  # at most; a patch of 1x2x2 with 16 channels has 64, and x is then read once
    inner: int = 64  # channels of x a step: 128 bytes of a row, whole cache lines
    # 56 to 80 registers a thread under Triton 3.7; 4 warps spill under 3.6, which finds a worse layout for the scatter.
    num_warps: int = 8
    num_stages: int = 4  # 64 KB of x and weights on their way

    @staticmethod
    def choose(form: PatchForm) -> "LinearUnpatchifyConfig":
        """Smaller blocks where a number or an address takes twice the registers."""
        if form.dtype == torch.float32 or form.wide:
            return LinearUnpatchifyConfig(tokens=32, pixels=32, inner=32, num_warps=4)
        return LinearUnpatchifyConfig()


def scatter_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, patches: Patches, capacity: int, *, channel_last: bool
) -> Tensor:
    """x [N, C] · weightᵀ + bias, each column to its pixel → flat [capacity]; zeros elsewhere.

    weight [K, C], bias [K], of any strides, have a row a pixel of a patch, laid out (pt, ph, pw, channel), or else
    (channel, pt, ph, pw).
    """
    num_pixels, width = weight.shape
    flat = x.new_zeros(capacity)
    grid, meta = _planned(patches.form(flat), patches.num_tokens, num_pixels)
    launch(
        *(linear_unpatchify_kernel, grid, x, *x.stride(), weight, *weight.stride()),
        *(bias, 0 if bias is None else bias.stride(0), flat, capacity, width, *patches.args),
        CHANNEL_LAST=channel_last,
        **meta,
    )
    return flat


@lru_cache
def _planned(form: PatchForm, num_tokens: int, num_pixels: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Grid and constants."""
    config, runs = LinearUnpatchifyConfig.choose(form), form.num_runs(num_pixels)
    block = fitted(config.pixels, runs * form.run_block) // form.run_block
    blocks = {"BLOCK_N": config.tokens, "BLOCK_C": config.inner, "BLOCK_R": block}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    grid = (cdiv(runs, block) * cdiv(num_tokens, config.tokens),)
    return grid, {**form.meta, "NUM_PIXELS": num_pixels, **blocks, **options}


@triton.jit
def linear_unpatchify_kernel(
    x, x_stride_n, x_stride_c, weight, weight_stride_k, weight_stride_c, bias, bias_stride, flat, capacity, width,
    offsets, shapes, segment_ids, coords, num_tokens,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    NUM_PIXELS: tl.constexpr, CHANNEL_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    NUM_RUNS: tl.constexpr = NUM_PIXELS // PW * ((PW + BLOCK_W - 1) // BLOCK_W)
    blocks: tl.constexpr = (NUM_RUNS + BLOCK_R - 1) // BLOCK_R
    # Neighbouring programs differ in the pixels: they find the same rows of x in the L2.
    n = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_R
    origins = patch_origins(n, offsets, shapes, segment_ids, coords, num_tokens, PT, PH, PW, WIDE, VECTOR)
    used = origins[7]
    columns, real = patch_columns(first, NUM_RUNS, PW, BLOCK_R, BLOCK_W)
    if CHANNEL_LAST:
        VOLUME: tl.constexpr = PT * PH * PW
        columns = columns % VOLUME * (NUM_PIXELS // VOLUME) + columns // VOLUME
    columns = columns.to(tl.int64)
    sums = tl.zeros([BLOCK_N, BLOCK_R * BLOCK_W], tl.float32)
    for first_channel in range(0, width, BLOCK_C):
        c = (first_channel + tl.arange(0, BLOCK_C)).to(tl.int64)
        place = x + n[:, None].to(tl.int64) * x_stride_n + c[None, :] * x_stride_c
        rows = tl.load(place, mask=used[:, None] & (c < width)[None, :], other=0.0)
        place = weight + columns[None, :] * weight_stride_k + c[:, None] * weight_stride_c
        weights = tl.load(place, mask=(c < width)[:, None] & real[None, :], other=0.0)
        sums = tl.dot(rows, weights, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + columns * bias_stride, mask=real, other=0.0).to(tl.float32)[None, :]
    pixels = tl.reshape(sums.to(flat.dtype.element_ty), [BLOCK_N, BLOCK_R, BLOCK_W])
    run = first + tl.arange(0, BLOCK_R)
    runs = patch_runs(run, run < NUM_RUNS, PT, PH, PW, BLOCK_W)
    store_pixels(flat, capacity, tl.permute(pixels, (1, 0, 2)), origins, runs, PW, VECTOR, BLOCK_W)
