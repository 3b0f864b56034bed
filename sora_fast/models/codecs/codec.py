"""Codec: from videos of any size to the latents that a model denoises, and back."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sora_fast.models.codecs.padding import Padded
from sora_fast.models.codecs.spec import LatentSpec
from sora_fast.packing import RaggedLatents

Size = tuple[int, int, int]  # (T, H, W)


class UnfitFrames(ValueError):
    """Frames whose values are not what a codec takes; the message says which."""


class Codec(ABC):
    """Encodes videos (C, T, H, W), float in [−1, 1], to latents of `spec.latent_shape`, and decodes them.

    No frame is lost and no size refused: what the strides do not divide is filled up with copies of the last frame,
    row and column, and cut off again. An image is a video of one frame. Who makes a codec says how videos of fitting
    sizes become latents and back (`_encoded`, `_decoded`); all else is here.
    """

    # Whether frames outside [−1, 1], which no network has ever seen, are refused: one look, that waits for the device.
    bounded = True

    @property
    @abstractmethod
    def spec(self) -> LatentSpec: ...

    @abstractmethod
    def _encoded(self, videos: Sequence[Padded]) -> list[Tensor]:
        """Latents (C, T, H, W) of videos, of `spec.latent_shape`, normalised."""

    @abstractmethod
    def _decoded(self, latents: Sequence[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
        """In pieces as they come, those of each video in order: (its number, the number of the first frame, frames
        (C, t, H, W) of all that the latents hold)."""

    def encode(self, video: Tensor) -> Tensor:
        """(C, T, H, W) → latents. ValueError or TypeError if it is no such video, UnfitFrames: see there."""
        return self.encode_all([video])[0]

    def encode_all(self, videos: Sequence[Tensor]) -> list[Tensor]:
        """Likewise, of videos of any sizes."""
        for video in videos:
            self._check_video(video)
        return self._encoded([Padded.to_strides(video, self.spec.spatial_stride) for video in videos])

    def encode_ragged(self, videos: RaggedLatents) -> RaggedLatents:
        """Likewise, from one buffer to another (waits for the device)."""
        return RaggedLatents.from_list(self.encode_all(videos.to_list()), max_segments=videos.max_segments)

    def encode_end(self, video: Tensor, before: int) -> Tensor:
        """The last latent frames of a video that ends with these frames, behind `before` others that nobody knows.

        A causal codec sees each frame beside those before it, and the first in a latent frame of its own: a copy of
        the first of these frames takes that place, others what lies before it, and what is encoded falls into the
        latent frames that it has in the whole. ValueError if the frames begin inside one.
        """
        if not before:
            return self.encode(video)
        if not self.spec.divides(before):
            raise ValueError(f"before: {before} ends inside a latent frame; {self.spec.nearest(before)} would not")
        copies = int(self.spec.first_frame_alone)
        whole = torch.cat([video[:, :1].expand(-1, copies, -1, -1), video], dim=1) if copies else video
        return self.encode(whole)[:, self.spec.latent_frames(copies) :]

    def decode(self, latents: Tensor, size: Size | None = None) -> Tensor:
        """Latents → (C, T, H, W) in [−1, 1]. size: (T, H, W) of the video; None: all that the latents hold."""
        return self.decode_all([latents], [size])[0]

    def decode_all(self, latents: Sequence[Tensor], sizes: Sequence[Size | None] | None = None) -> list[Tensor]:
        """Likewise, of any sizes."""
        sizes = [self._size(*item) for item in zip(latents, sizes or [None] * len(latents), strict=True)]
        videos: list[Tensor | None] = [None] * len(latents)
        for number, start, frames in self._clipped(latents, sizes):
            if frames.shape[1] == sizes[number][0]:
                videos[number] = frames
                continue
            if videos[number] is None:
                videos[number] = frames.new_empty(frames.shape[0], *sizes[number])
            videos[number][:, start : start + frames.shape[1]] = frames
        return videos

    def decode_ragged(self, latents: RaggedLatents, sizes: Sequence[Size | None] | None = None) -> RaggedLatents:
        """Likewise, from one buffer to another (waits for the device)."""
        return RaggedLatents.from_list(self.decode_all(latents.to_list(), sizes), max_segments=latents.max_segments)

    def stream(self, latents: Tensor, size: Size | None = None) -> Iterator[Tensor]:
        """What `decode` gives, a few frames (C, t, H, W) at a time, as they come."""
        for _, _, frames in self._clipped([latents], [self._size(latents, size)]):
            yield frames

    def _clipped(self, latents: Sequence[Tensor], sizes: Sequence[Size]) -> Iterator[tuple[int, int, Tensor]]:
        """`_decoded`, without what was filled up."""
        for number, start, frames in self._decoded(latents):
            count, height, width = sizes[number]
            if start < count:
                yield number, start, frames[:, : count - start, :height, :width].clamp(-1, 1)

    def _size(self, latents: Tensor, size: Size | None) -> Size:
        """ValueError if these are not latents of this codec, of a video of this size."""
        spec = self.spec
        if latents.ndim != 4 or latents.shape[0] != spec.channels:
            raise ValueError(f"latents: {tuple(latents.shape)}; those of this codec are ({spec.channels}, T, H, W)")
        largest = spec.video_shape(tuple(latents.shape))[1:]
        if size is not None and spec.latent_shape(*size) != tuple(latents.shape):
            raise ValueError(
                f"latents: {tuple(latents.shape)}; those of a video of {'x'.join(map(str, size))} are "
                f"{spec.latent_shape(*size)}"
            )
        return largest if size is None else size

    def _check_video(self, video: Tensor) -> None:
        channels = self.spec.pixel_channels
        if video.ndim != 4 or video.shape[0] != channels or 0 in video.shape:
            raise ValueError(f"video: shape {tuple(video.shape)}; it must be ({channels}, T, H, W)")
        if not video.is_floating_point():
            raise TypeError(f"video: {video.dtype}; it must be floating point, with values in [-1, 1]")
        if self.bounded:
            low, high = (bound.item() for bound in video.aminmax())
            if not (low >= -1 and high <= 1):  # NaN is neither
                raise UnfitFrames(f"video: values from {low:g} to {high:g}; they must lie in [-1, 1]")
