"""Which elements of the flat buffer a token's patch is made of: what patch_embed and unpatchify share."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Up to this many elements in the buffer, addresses fit into int32, which costs half the registers and instructions.
INT32_ELEMENTS = 2**31 - 1


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

    def is_wide(self, elements: int) -> bool:
        """True if addresses in a buffer of so many elements need int64."""
        return elements > INT32_ELEMENTS

    def meta(self, elements: int) -> dict[str, Any]:
        """The constants that go with `args`. elements: in the flat buffer."""
        pt, ph, pw = self.patch_size
        return {"PT": pt, "PH": ph, "PW": pw, "WIDE": self.is_wide(elements)}


@triton.jit
def patch_origins(
    tokens, offsets, shapes, segment_ids, coords, num_tokens,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of each token of a block [n]: is it no padding, the element that its patch starts at, the video's T, H, W, and
    how many frames, rows and columns of the video lie from that start on."""
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
    start = tl.load(offsets + segment, mask=used, other=0).to(index) + (t * height + h) * width + w
    return used, start, frames, height, width, frames - t, height - h, width - w


@triton.jit
def patch_pixels(
    origins, pixels, NUM_PIXELS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr
):  # fmt: skip
    """Elements [n, p] of the `pixels` [p] of each token's patch, numbered in the order (c, pt, ph, pw), and which
    exist: not those beyond the video's edge, and none of padding."""
    _, start, frames, height, width, frames_left, height_left, width_left = origins
    w = (pixels % PW)[None, :]
    h = (pixels // PW % PH)[None, :]
    t = (pixels // (PW * PH) % PT)[None, :]
    c = (pixels // (PW * PH * PT))[None, :]
    elements = start[:, None] + ((c * frames[:, None] + t) * height[:, None] + h) * width[:, None] + w
    inside = (t < frames_left[:, None]) & (h < height_left[:, None]) & (w < width_left[:, None])
    # A padding token's video has no frames, so none of its pixels is inside.
    return elements, inside & (pixels < NUM_PIXELS)[None, :]
