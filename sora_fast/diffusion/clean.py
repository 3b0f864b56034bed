"""Which tokens are given clean: the first and last frames of clips."""

import torch
from torch import Tensor

from sora_fast.packing import PackedLayout


def clean_frames(layout: PackedLayout, head: Tensor, tail: Tensor) -> Tensor:
    """[N] bool: tokens of the first `head` and the last `tail` latent frames of their segment; both [S] integers."""
    for name, value in (("head", head), ("tail", tail)):
        if value.shape != (layout.max_segments,):
            raise ValueError(f"{name}: shape {tuple(value.shape)}; it must be [{layout.max_segments}], one a segment")
    segment = layout.segment_ids.clamp(min=0)
    frame = layout.coords[:, 0]
    ends = (frame < head[segment]) | (frame >= (layout.grids[:, 0] - tail)[segment])
    return ends & (layout.segment_ids >= 0)


def random_clean_ends(
    layout: PackedLayout, generator: torch.Generator | None = None, *, share: float = 0.5, single: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(head, tail) for training, [S] int32 each: how many first and last latent frames of each segment are clean.

    share: of the clips get clean frames: first, last or both, alike. A model only learns what it has seen, and every
    task but plain generation starts from clean frames. single: of these ends are one frame (an image to begin or end
    with), the others of any length. At least one frame stays noisy; still images (T = 1) always do.
    generator: on the layout's device.
    """
    for name, value in (("share", share), ("single", single)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: {value}; it must lie between 0 and 1")
    frames = layout.grids[:, 0]
    chosen, kind, short, length, cut = torch.rand(
        5, layout.max_segments, generator=generator, dtype=torch.float32, device=layout.device
    ).unbind(0)
    # Both ends need three frames; where there are two, the kind falls back to the first end.
    kind = torch.where((kind >= 2 / 3) & (frames < 3), 0.0, kind)
    both = (kind >= 2 / 3).int()
    most = torch.where(short < single, 1 + both, frames - 1)
    total = 1 + both + (length * (most - both)).int()
    total = torch.where((chosen < share) & (frames > 1), torch.minimum(total, frames - 1), 0)
    split = 1 + (cut * (total - 1)).int()
    head = torch.where(both > 0, split, total * (kind < 1 / 3))
    head = torch.minimum(head, total)
    return head.int(), (total - head).int()
