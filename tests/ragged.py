"""Random ragged latents with their layout, shared by the tests of patch_embed and unpatchify."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import strategies as st
from torch import Tensor

from sora_fast.ops import _library
from sora_fast.ops._patches import PatchSize
from sora_fast.packing import PackedLayout, RaggedLatents

# Of the ops on patches: plain PyTorch, Triton, and the compiled library for where the tests run.
_LIBRARY = "cuda" if torch.cuda.is_available() else "cpu"
_MISSING = _library.missing(_LIBRARY)
needs_library = pytest.mark.skipif(_MISSING is not None, reason=_MISSING or "")
BACKENDS = ("torch", pytest.param(_LIBRARY, marks=needs_library), "triton")

# The interpreter is not trusted with bf16, and a GPU is.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


@dataclass(frozen=True)
class RaggedCase:
    """Videos `shapes` (C, T, H, W) in patches of `patch_size`; in all, an unused segment and unused space."""

    shapes: tuple[tuple[int, int, int, int], ...] = ((3, 3, 5, 4), (3, 1, 2, 7))
    patch_size: PatchSize = (2, 2, 2)
    order: str = "raster"
    drop: bool = False
    spare_tokens: int = 5
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def channels(self) -> int:
        return self.shapes[0][0]

    @property
    def num_pixels(self) -> int:
        """Numbers in a patch."""
        return self.channels * int(np.prod(self.patch_size))

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        return [tuple(-(-size // p) for size, p in zip(s[1:], self.patch_size, strict=True)) for s in self.shapes]

    def layout(self) -> PackedLayout:
        rng = np.random.default_rng(self.seed)
        sizes = [int(np.prod(grid)) for grid in self.grids]
        keep = [rng.permutation(size)[: rng.integers(0, size + 1)] for size in sizes] if self.drop else None
        tokens = sum(sizes) if keep is None else sum(map(len, keep))
        return PackedLayout.from_grids(
            self.grids,
            order=self.order,
            keep=keep,
            capacity=tokens + self.spare_tokens,
            max_segments=len(sizes) + 1,
            tile_size=16,
        )

    def latents(self) -> RaggedLatents:
        torch.manual_seed(self.seed)
        videos = [torch.randn(shape, dtype=torch.float64).to(self.dtype) for shape in self.shapes]
        elements = sum(video.numel() for video in videos)
        return RaggedLatents.from_list(videos, capacity=elements + 9, max_segments=len(videos) + 1)

    def patches(self, flat: Tensor) -> Tensor:
        """[N, K] of the layout's tokens, laid out (c, pt, ph, pw), zeros for padding: each video padded and cut up."""
        pt, ph, pw = self.patch_size
        layout, rows = self.layout(), []
        for segment, video in enumerate(self.latents().with_flat(flat).to_list()):
            full = pad(video, self.patch_size)
            rows.append(
                rearrange(full, "c (t pt) (h ph) (w pw) -> (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)[
                    layout.raster_index[layout.segment_ids == segment].long()
                ]
            )
        return torch.cat([*rows, flat.new_zeros(self.spare_tokens, self.num_pixels)])

    def unread(self) -> Tensor:
        """[elements] bool: the pixels of dropped tokens, and what lies past the last video."""
        flat = torch.zeros(self.latents().flat.numel(), dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(self.patches(flat).sum(), flat)[0] == 0


def pad(video: Tensor, patch_size: PatchSize) -> Tensor:
    """Zeros after the end of each axis, up to a multiple of the patch."""
    t, h, w = (-size % patch for size, patch in zip(video.shape[1:], patch_size, strict=True))
    return F.pad(video, (0, w, 0, h, 0, t))


@st.composite
def ragged_cases(draw: st.DrawFn) -> RaggedCase:
    """Sizes that the patch divides and not, images, empty segments, both orders, dropping."""
    channels = draw(st.sampled_from([1, 2, 3, 4]))
    sides = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))
    return RaggedCase(
        shapes=tuple((channels, *side) for side in draw(st.lists(sides, min_size=1, max_size=3))),
        patch_size=draw(st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 3), (1, 4, 4)])),
        order=draw(st.sampled_from(["raster", "tiled"])),
        drop=draw(st.booleans()),
        spare_tokens=draw(st.integers(0, 9)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
    )
