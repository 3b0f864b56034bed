"""Which elements of the flat buffer a token's patch is made of, and how they are moved: what kernels on patches share.

A patch is a set of *runs*: pw pixels, in pieces of 16 at most, that stand next to each other in memory. A block of
pixels is [r, n, w]: runs, tokens, places in a run. With the tokens in the middle, neighbouring lanes of a warp first go
along a run and then to the next token, whose run continues the first one's in memory wherever the tokens are neighbours
in w, as nearly all are in raster and in tiled order. What a warp's request then moves, in sectors of 32 bytes: for
pw = 2 in bf16, 128 bytes of 4 sectors in raster order, of 4 to 8 in boxes 8 wide (with its lanes along the runs of one
token it would be 64 bytes of 16 sectors); for pw of 8 and more, 512 bytes of 16 sectors, 16 bytes a lane.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._launch import cdiv, next_power_of_two
from sora_fast.kernels._videos import videos as videos  # what is proved of an op is all that its kernels import

# Up to this many elements in the buffer, addresses fit into int32, which costs half the registers and instructions.
INT32_ELEMENTS = 2**31 - 1
# Longest run: a whole sector even of bytes, and short enough that a block holds many tokens.
MAX_RUN = 16


class Patches(NamedTuple):
    """offsets [S+1], shapes [S, 4] of the latents; segment_ids [N], coords [N, 3] of the layout; (pt, ph, pw)."""

    offsets: Tensor
    shapes: Tensor
    segment_ids: Tensor
    coords: Tensor
    patch_size: tuple[int, int, int]

    @property
    def num_tokens(self) -> int:
        """N, the static length of the packed sequence."""
        return self.segment_ids.shape[0]

    @property
    def args(self) -> tuple[Any, ...]:
        """What a kernel that calls `patch_origins` takes."""
        return self.offsets, self.shapes, self.segment_ids, self.coords, self.num_tokens

    def form(self, flat: Tensor) -> "PatchForm":
        """Of these patches in `flat`, which may be strided."""
        return PatchForm(self.patch_size, flat.dtype, flat.numel() * max(1, flat.stride(0)) > INT32_ELEMENTS)


class PatchForm(NamedTuple):
    """What a launch on patches depends on beside its sizes, which it is planned by once for all (they are cached).

    dtype: of the pixels. wide: offsets to them need int64.
    """

    patch_size: tuple[int, int, int]
    dtype: torch.dtype
    wide: bool

    @property
    def run_block(self) -> int:
        """Places for a run's pixels in a block: a power of two."""
        return min(MAX_RUN, next_power_of_two(self.patch_size[2]))

    def num_runs(self, num_pixels: int) -> int:
        """Runs of a patch of so many pixels in all channels."""
        pw = self.patch_size[2]
        return num_pixels // pw * cdiv(pw, self.run_block)

    @property
    def meta(self) -> dict[str, Any]:
        """The constants that go with `Patches.args` in a kernel."""
        pt, ph, pw = self.patch_size
        # Most pixels of a run that one instruction may move: 16 bytes, if every run starts at a multiple of them.
        vector = min(pw & -pw, 16 // self.dtype.itemsize)
        return {"PT": pt, "PH": ph, "PW": pw, "WIDE": self.wide, "VECTOR": vector, "BLOCK_W": self.run_block}


def fitted(block: int, size: int) -> int:
    """No larger than needed, no smaller than the 16 that a matrix instruction takes."""
    return min(block, max(16, next_power_of_two(size)))


@triton.jit
def patch_origins(
    tokens, offsets, shapes, segment_ids, coords, num_tokens,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of each token of a block [n]: the element that its patch starts at, the video's T, H, W, and how many frames,
    rows and columns of the video lie from that start on; none for padding. Then which tokens are none, and, one for
    the block, whether all rows of its videos start at a multiple of VECTOR elements."""
    segment = tl.load(segment_ids + tokens, mask=tokens < num_tokens, other=-1)
    used = segment >= 0
    segment = tl.maximum(segment, 0)
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    frames = tl.load(shapes + segment * 4 + 1, mask=used, other=0).to(index)
    height = tl.load(shapes + segment * 4 + 2, mask=used, other=0).to(index)
    width = tl.load(shapes + segment * 4 + 3, mask=used, other=0).to(index)
    place = coords + tokens.to(tl.int64) * 3
    t = tl.load(place, mask=used, other=0) * PT
    h = tl.load(place + 1, mask=used, other=0) * PH
    w = tl.load(place + 2, mask=used, other=0) * PW
    first = tl.load(offsets + segment, mask=used, other=0).to(index)
    aligned = True if VECTOR == 1 else tl.max((first | width) % VECTOR, axis=0) == 0
    start = first + (t * height + h) * width + w
    return start, frames, height, width, frames - t, height - h, width - w, used, aligned


@triton.jit
def patch_runs(runs, exist, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, BLOCK_W: tl.constexpr):
    """Of runs [r], numbered in the order (c, pt, ph, pieces of pw): channel, frame, row, column, and which exist."""
    PIECES: tl.constexpr = (PW + BLOCK_W - 1) // BLOCK_W  # written out: Triton 3.6 has no tl.cdiv of constants
    c, t, h, w = runs // (PIECES * PH * PT), runs // (PIECES * PH) % PT, runs // PIECES % PH, runs % PIECES * BLOCK_W
    return c, t, h, w, exist


@triton.jit
def patch_columns(first, NUM_RUNS: tl.constexpr, PW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Numbers [p], in the order (c, pt, ph, pw), of the pixels of BLOCK_R runs from `first` on, and which exist."""
    PIECES: tl.constexpr = (PW + BLOCK_W - 1) // BLOCK_W
    place = first * BLOCK_W + tl.arange(0, BLOCK_R * BLOCK_W)
    if PW % BLOCK_W == 0:
        return place, place < NUM_RUNS * BLOCK_W
    run = place // BLOCK_W
    w = run % PIECES * BLOCK_W + place % BLOCK_W
    return run // PIECES * PW + w, (run < NUM_RUNS) & (w < PW)


@triton.jit
def load_pixels(
    flat, stride, capacity, origins, runs, PW: tl.constexpr, VECTOR: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Pixels [r, n, w]; zeros beyond a video's edge and for padding. capacity: elements of `flat`."""
    if origins[8]:
        elements, exists = _places(capacity, origins, runs, PW, VECTOR, BLOCK_W)
        pixels = tl.load(flat + elements * stride, mask=exists, other=0.0)
    else:
        elements, exists = _places(capacity, origins, runs, PW, 1, BLOCK_W)
        pixels = tl.load(flat + elements * stride, mask=exists, other=0.0)
    return pixels


@triton.jit
def store_pixels(
    flat, capacity, pixels, origins, runs, PW: tl.constexpr, VECTOR: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """The transpose of `load_pixels`. A pixel belongs to one token at the most: plain stores."""
    if origins[8]:
        elements, exists = _places(capacity, origins, runs, PW, VECTOR, BLOCK_W)
        tl.store(flat + elements, pixels, mask=exists)
    else:
        elements, exists = _places(capacity, origins, runs, PW, 1, BLOCK_W)
        tl.store(flat + elements, pixels, mask=exists)


@triton.jit
def _places(capacity, origins, runs, PW: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_W: tl.constexpr):
    """Elements [r, n, w] of `runs`, and which exist. ALIGNMENT: all rows of the videos start at a multiple of it."""
    start, frames, height, width, frames_left, height_left, width_left, _, _ = origins
    c, t, h, first, exist = runs
    start = _multiple(start, ALIGNMENT)
    width = _multiple(width, ALIGNMENT)
    # Only so does the compiler see that a vector exists as a whole or not at all.
    width_left = _multiple(width_left, ALIGNMENT)
    capacity = _multiple(capacity, ALIGNMENT)
    w = first[:, None, None] + tl.arange(0, BLOCK_W)[None, None, :]
    rows = (c[:, None] * frames[None, :] + t[:, None]) * height[None, :] + h[:, None]
    elements = (start[None, :] + rows * width[None, :])[:, :, None] + w
    inside = exist[:, None] & (t[:, None] < frames_left[None, :]) & (h[:, None] < height_left[None, :])
    exists = inside[:, :, None] & (w < width_left[None, :, None]) & (elements < capacity)
    if PW % BLOCK_W:
        exists &= w < PW
    return elements, exists


@triton.jit
def _multiple(x, ALIGNMENT: tl.constexpr):
    """x, which is a multiple of ALIGNMENT, said so that the compiler sees it. (tl.multiple_of would mark the operation
    that x comes from, and so the x of the other branch.)"""
    return x // ALIGNMENT * ALIGNMENT
