"""Videos and images on disk, read into tensors."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sora_fast.media.frames import Frame, UnreadableMedia, at_rate, mean_rate
from sora_fast.media.images import image_frames
from sora_fast.media.probing import scaled
from sora_fast.media.timeline import Timeline
from sora_fast.media.videos import frames_from, video_frames

# Numbers in the frames that repeat the one before, because fps= asks for more than there are: a file of a few bytes
# must not fill the memory.
MAX_REPEATED = 1 << 30


@dataclass(frozen=True)
class Clip:
    """What a file shows.

    video: (C, T, H, W) float32 in [-1, 1].
    fps: frames per second that these frames stand for: the rate asked for, else the file's own. Where frames last
        unequally long (GIFs, recordings of a screen), their mean rate: played so, the clip lasts as long as it did.
        None for a still image, and where the file says nothing.
    """

    video: Tensor
    fps: float | None


def read_media(
    path: str | PathLike[str],
    *,
    max_frames: int | None = None,
    fps: float | None = None,
    max_side: int | None = None,
    channels: int = 3,
) -> Tensor:
    """`read_clip(...).video`: (channels, T, H, W) float32 in [-1, 1]."""
    return read_clip(path, max_frames=max_frames, fps=fps, max_side=max_side, channels=channels).video


def read_clip(
    path: str | PathLike[str],
    *,
    max_frames: int | None = None,
    fps: float | None = None,
    max_side: int | None = None,
    channels: int = 3,
    start: int = 0,
    timeline: Timeline | None = None,
) -> Clip:
    """Reads any video or image that PyAV or Pillow reads, as a good player would show it.

    Upright, mirrored where the file says so; on black where it is transparent; with square pixels (videos; the height
    stays); in sRGB, whatever its matrix, range, primaries, transfer or ICC profile; in 8 bits a channel, scaled by the
    format's own maximum; grids of tiles whole. The README has a table of it.

    Args:
        max_frames: stop after that many frames; None reads all.
        fps: frames per second to sample the video at (each instant shows its latest frame, and the last frame lasts
            as long as the file says); None takes every frame.
        max_side: frames with a longer side are scaled down to it, keeping their aspect ratio.
        channels: 3 for RGB, 1 for grey.
        start: leave out so many of the frames, those of `fps` if it is given.
        timeline: the file's own, from `probe`: what is left out of a video is then not decoded either, but for the
            frames from the last keyframe on. The same frames come as without it.

    Raises:
        UnreadableMedia: an empty, corrupt, truncated or audio-only file, whatever is no video or image at all, and
            whatever else a decoder fails on, memory included.
            Also numbers of which nothing says what white is. Frames behind the last one asked for are not decoded
            (of Matroska and FLV, one is), hence not checked.
        FileNotFoundError, ValueError: no such file; an option out of range.
    """
    path = Path(path)
    for name, value in {"max_frames": max_frames, "fps": fps, "max_side": max_side}.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive or None, got {value}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
    if path.stat().st_size == 0:
        raise UnreadableMedia(path, "empty file (0 bytes)")

    try:
        frames = islice(_frames(path, fps, start, timeline), max_frames)
        return _to_clip(path, frames, max_side, channels)
    except UnreadableMedia:
        raise
    except Exception as error:  # a decoder meets what its author did not think of, or sizes that no memory holds
        raise UnreadableMedia(path, f"cannot be decoded: {error!r}") from error


def _frames(path: Path, fps: float | None, start: int, timeline: Timeline | None) -> Iterator[Frame]:
    if timeline is None or not timeline.can_seek or not start:
        frames = image_frames(path) or video_frames(path)
        return islice(frames if fps is None else at_rate(frames, fps), start, None)
    if fps is None:
        return frames_from(path, timeline, start)
    frames = frames_from(path, timeline, timeline.shown(start, fps))
    return at_rate(frames, fps, beginning=timeline.first, first=start)


def _to_clip(path: Path, frames: Iterable[Frame], max_side: int | None, channels: int) -> Clip:
    first = last = None
    arrays: list[np.ndarray] = []
    repeated = 0
    for frame in frames:
        if last is not None and frame.image is last.image:
            arrays.append(arrays[-1])
            repeated += max(arrays[-1].size, MAX_REPEATED >> 18)
            if repeated > MAX_REPEATED:
                raise UnreadableMedia(path, f"one picture lasts for more than {len(arrays)} frames: give max_frames")
        else:
            arrays.append(_to_array(frame.image, max_side, channels))
        first, last = first or frame, frame
    if first is None or last is None:
        raise UnreadableMedia(path, "no frame could be decoded")
    return Clip(_to_tensor(path, arrays), mean_rate(first, last, len(arrays)))


def _to_array(image: Image.Image, max_side: int | None, channels: int) -> np.ndarray:
    height, width = scaled(image.height, image.width, max_side)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image) if channels == 3 else np.asarray(image.convert("L"))[..., None]


def _to_tensor(path: Path, arrays: Sequence[np.ndarray]) -> Tensor:
    if any(array.shape != arrays[0].shape for array in arrays):
        raise UnreadableMedia(path, "frames change their size on the way")
    pixels = torch.from_numpy(np.stack(arrays)).permute(3, 0, 1, 2)
    return pixels.to(torch.float32).div_(127.5).sub_(1)
