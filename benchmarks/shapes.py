"""The sizes that are measured, in one table: models, packs of videos, masks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sora_fast.masks import SpacetimeMask

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Model:
    """Width and heads of a diffusion transformer."""

    width: int
    heads: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


# DiT's four sizes (Peebles & Xie 2023, Table 1), and video models by their number of parameters, as Wan 2.1 and 2.2
# have them.
MODELS: Mapping[str, Model] = {
    "DiT-S": Model(384, 6),
    "DiT-B": Model(768, 12),
    "DiT-L": Model(1024, 16),
    "DiT-XL": Model(1152, 16),
    "1.3B": Model(1536, 12),
    "5B": Model(3072, 24),
    "14B": Model(5120, 40),
}


@dataclass(frozen=True)
class Pack:
    """Token grids (T, H, W) of the videos and images of one batch."""

    grids: tuple[Grid, ...]

    @property
    def tokens(self) -> int:
        return sum(map(math.prod, self.grids))


# Ragged packs have as many tokens as the uniform ones, from a video that is nearly half of them down to a thumbnail.
PACKS: Mapping[str, Pack] = {
    "tiny": Pack(((2, 4, 4), (1, 5, 3))),
    "2k uniform": Pack(((4, 16, 16),) * 2),
    "2k ragged": Pack(((4, 12, 24), (1, 24, 32), (1, 8, 16))),
    "8k uniform": Pack(((8, 16, 16),) * 4),
    "8k ragged": Pack(((8, 16, 24), (4, 16, 28), (1, 32, 48), (1, 24, 40), (2, 16, 20), (1, 12, 16))),
    "32k uniform": Pack(((8, 32, 32),) * 4),
    "32k ragged": Pack(
        (
            (16, 24, 40),
            (8, 30, 32),
            (1, 64, 48),
            (1, 32, 32),
            (4, 16, 24),
            (1, 24, 40),
            (4, 16, 32),
            (4, 16, 17),
        )
    ),
    "128k uniform": Pack(((8, 64, 64),) * 4),
    "128k ragged": Pack(
        (
            (24, 40, 64),
            (16, 36, 52),
            (8, 48, 48),
            (1, 96, 96),
            (4, 32, 48),
            (1, 64, 64),
            (2, 28, 32),
        )
    ),
    # 5 seconds at 720p, as HunyuanVideo has them: the grid on which windows are compared in print.
    "115k video": Pack(((30, 48, 80),)),
}

# 18×24×24 tokens around the query, shifted inwards at the edges. NATTEN's window of this size does 1/11.1 of the full
# mask's work on the video of 115k tokens.
_WINDOW = {"t": (-8, 9), "h": (-11, 12), "w": (-11, 12), "clamp": (True, True, True)}
# Queries of such a box share one window, whose edges lie between boxes: every tile that is visited is full.
WINDOW_BOX = (2, 8, 8)

MASKS: Mapping[str, SpacetimeMask] = {
    "full": SpacetimeMask.full(),
    "frame_causal": SpacetimeMask.frame_causal(),
    "spatial": SpacetimeMask.spatial(),
    "temporal": SpacetimeMask.temporal(),
    "window": SpacetimeMask(**_WINDOW),
    "window strided": SpacetimeMask(**_WINDOW, stride=WINDOW_BOX),
    # For packs whose grids are smaller than the other two.
    "small window": SpacetimeMask.window(1, 2, 2),
}
