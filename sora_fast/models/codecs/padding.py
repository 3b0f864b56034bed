"""Videos of any size, seen as the size that a codec's strides need."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class Padded:
    """A video (C, T, H, W), and around it, for ever, copies: of the first frame before it, of the last one behind it,
    of the last row and column. None is made before it is asked for.

    height, width: with as many copies as the codec needs.
    """

    video: Tensor
    height: int
    width: int

    @staticmethod
    def to_strides(video: Tensor, spatial_stride: int) -> "Padded":
        """Sides filled up to multiples of a stride."""
        height, width = (-(-side // spatial_stride) * spatial_stride for side in video.shape[2:])
        return Padded(video, height, width)

    def frames(self, start: int, stop: int, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """(C, stop − start, h, w), all of the frame or some rows and columns; the video itself where that is meant."""
        last = self.video.shape[1] - 1
        before, after = min(max(-start, 0), stop - start), min(max(stop - 1 - last, 0), stop - start)
        parts = [self.video[:, max(start, 0) : max(min(stop, last + 1), 0)]]
        if before:
            parts.insert(0, self.video[:, :1].expand(-1, before, -1, -1))
        if after:
            parts.append(self.video[:, last:].expand(-1, after, -1, -1))
        return self._sides(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], rows, columns)

    def _sides(self, frames: Tensor, rows: slice, columns: slice) -> Tensor:
        (top, bottom, _), (left, right, _) = rows.indices(self.height), columns.indices(self.width)
        height, width = frames.shape[2:]
        inside = frames[:, :, min(top, height - 1) : bottom, min(left, width - 1) : right]
        missing = bottom - top - inside.shape[2], right - left - inside.shape[3]
        return pad(inside, (0, missing[1], 0, missing[0]), mode="replicate") if max(missing) > 0 else inside
