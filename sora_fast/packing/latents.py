"""RaggedLatents: many videos of any shape in one flat buffer of static size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sora_fast.packing._bundle import TensorBundle


@dataclass(frozen=True, eq=False)
class RaggedLatents(TensorBundle):
    """Up to S videos (C, T, H, W), each contiguous, one after the other.

    flat: [capacity] elements; what lies past the last video is unspecified.
    offsets [S+1] int64: first element of every video, then the end; unused places repeat the last offset.
    shapes [S, 4] int32: (C, T, H, W) of every video; zeros for unused places.
    """

    flat: Tensor
    offsets: Tensor
    shapes: Tensor

    @property
    def max_segments(self) -> int:
        """S, the static number of videos."""
        return self.shapes.shape[0]

    @staticmethod
    def from_list(
        videos: Sequence[Tensor], *, capacity: int | None = None, max_segments: int | None = None
    ) -> "RaggedLatents":
        """Pack videos (C, T, H, W) of one dtype and device; images are videos with T = 1.

        capacity: elements in the buffer; max_segments: places for videos; default: exactly what is needed. The rest
        of the buffer is zero. Raises ValueError if the videos do not fit.
        """
        for index, video in enumerate(videos):
            if video.ndim != 4:
                raise ValueError(f"videos: number {index} has shape {tuple(video.shape)}; it must be (C, T, H, W)")
            if video.dtype != videos[0].dtype or video.device != videos[0].device:
                raise TypeError(
                    f"videos: number {index} is {video.dtype} on {video.device}, the first {videos[0].dtype} on "
                    f"{videos[0].device}; all must agree"
                )
        places = len(videos) if max_segments is None else max_segments
        total = sum(video.numel() for video in videos)
        size = total if capacity is None else capacity
        if len(videos) > places:
            raise ValueError(f"max_segments: {places}, but there are {len(videos)} videos")
        if total > size:
            raise ValueError(f"capacity: {size} elements, but the videos have {total}")
        like = videos[0] if videos else torch.empty(0, dtype=torch.float32, device="cpu")
        flat = torch.cat([*(video.reshape(-1) for video in videos), like.new_zeros(size - total)])
        shapes, offsets = _tables([tuple(video.shape) for video in videos], places)
        return RaggedLatents(flat, offsets.to(flat.device), shapes.to(flat.device))

    @staticmethod
    def empty(
        shapes: Sequence[tuple[int, int, int, int]],
        *,
        capacity: int | None = None,
        max_segments: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "RaggedLatents":
        """Zeros of the given shapes (C, T, H, W)."""
        videos = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        return RaggedLatents.from_list(videos, capacity=capacity, max_segments=max_segments)

    def to_list(self) -> list[Tensor]:
        """The videos (C, T, H, W) as views of the buffer, without the unused places (waits for the device)."""
        offsets, shapes = self.offsets.tolist(), self.shapes.tolist()
        used = [index for index, shape in enumerate(shapes) if math.prod(shape)]
        return [self.flat[offsets[i] : offsets[i + 1]].view(shapes[i]) for i in used]

    def with_flat(self, flat: Tensor) -> "RaggedLatents":
        """The same videos with other values."""
        return replace(self, flat=flat)


def _tables(shapes: list[tuple[int, ...]], places: int) -> tuple[Tensor, Tensor]:
    table = np.zeros((places, 4), dtype=np.int32)
    if shapes:
        table[: len(shapes)] = shapes
    sizes = table.astype(np.int64).prod(axis=1)
    return torch.from_numpy(table), torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))
