"""Videos and images on disk, read into tensors."""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from os import PathLike
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

# What Pillow reads better than FFmpeg does: it notices truncation, and honours orientation and transparency.
IMAGE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
ANIMATED_FORMATS = ("PNG", "GIF", "WEBP")  # in others a second picture is a thumbnail or the other eye

DEFAULT_RATE = Fraction(25)  # of streams that carry neither timestamps nor a rate; FFmpeg assumes the same
GIF_DEFAULT_SECONDS = 0.1  # what browsers show a GIF frame for that asks for no time at all


class UnreadableMedia(ValueError):
    """A file that holds no usable video or image. `path` says which file, `reason` says why."""

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


def read_media(
    path: str | PathLike[str],
    *,
    max_frames: int | None = None,
    fps: float | None = None,
    max_side: int | None = None,
    channels: int = 3,
) -> Tensor:
    """Reads any video or image that PyAV or Pillow reads.

    Args:
        max_frames: stop after that many frames; None reads all.
        fps: frames per second to sample the video at (each instant shows its latest frame); None takes every frame.
        max_side: frames with a longer side are scaled down to it, keeping their aspect ratio.
        channels: 3 for RGB, 1 for grey.

    Returns:
        (channels, T, H, W) float32 in [-1, 1]. Rotation stored in the file is applied; transparency lies on black.

    Raises:
        UnreadableMedia: an empty, corrupt, truncated or audio-only file, whatever is no video or image at all, and
            whatever else a decoder fails on, memory included.
            Frames behind the last one asked for are not decoded, hence not checked.
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
        timed = _timed_frames(path)
        frames = (image for _, image in timed) if fps is None else _at_rate(timed, fps)
        return _to_tensor(path, [_to_array(image, max_side, channels) for image in islice(frames, max_frames)])
    except UnreadableMedia:
        raise
    except Exception as error:  # a decoder meets what its author did not think of, or sizes that no memory holds
        raise UnreadableMedia(path, f"cannot be decoded: {error!r}") from error


# Reading. Every source becomes (seconds, RGB image) pairs.


def _timed_frames(path: Path) -> Iterator[tuple[float, Image.Image]]:
    try:
        image = Image.open(path, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        return _video_frames(path)
    except Exception as error:  # Pillow's parsers raise whatever they stumble over: IndexError, struct.error, …
        raise UnreadableMedia(path, _image_reason(error)) from error
    return _image_frames(path, image)


def _image_frames(path: Path, image: Image.Image) -> Iterator[tuple[float, Image.Image]]:
    seconds = 0.0
    try:
        with image:
            pages = ImageSequence.Iterator(image) if image.format in ANIMATED_FORMATS else (image,)
            for page in pages:
                page.load()
                yield seconds, _on_black(ImageOps.exif_transpose(page))
                seconds += page.info.get("duration", 0) / 1000 or GIF_DEFAULT_SECONDS
    except Exception as error:
        raise UnreadableMedia(path, _image_reason(error)) from error


def _image_reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:  # Pillow's own have no number
        return f"cannot be read: {error.strerror}"
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return f"too large an image: {error}"
    return f"corrupt or truncated image: {error}"


def _on_black(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer).convert("RGB")


def _video_frames(path: Path) -> Iterator[tuple[float, Image.Image]]:
    try:
        # "file:" keeps a colon in a name from being read as a protocol; the whitelist keeps playlists off the network.
        options = {"protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
            yield from _decode(path, container, _picture_stream(path, container))
    except av.error.FFmpegError as error:
        raise UnreadableMedia(path, _ffmpeg_reason(path, error)) from error


def _ffmpeg_reason(path: Path, error: av.error.FFmpegError) -> str:
    with path.open("rb") as file:
        if file.read(8)[4:] == b"ftyp":
            return f"corrupt or truncated video: {error.strerror}"
    return f"corrupt, or not a video or image: {error.strerror}"


def _picture_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if container.format.name == "tty":  # FFmpeg plays any text file as a terminal's screen
        raise UnreadableMedia(path, "a text file, not a video or image")
    if not streams:
        raise UnreadableMedia(path, "no video in it (audio only)" if container.streams.audio else "no video in it")
    indexed = max((entry.pos + entry.size for entry in streams[0].index_entries), default=0)
    if indexed > path.stat().st_size:
        raise UnreadableMedia(path, f"truncated: {path.stat().st_size} bytes of at least {indexed}")
    return streams[0]


def _decode(
    path: Path, container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[tuple[float, Image.Image]]:
    rate = stream.average_rate or DEFAULT_RATE
    count, end = 0, 0.0
    for packet in container.demux():  # all streams: the container's duration is that of the longest
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index:
            continue
        for frame in packet.decode():
            if frame.is_corrupt or packet.is_corrupt:
                raise UnreadableMedia(path, f"corrupt or truncated video: frame {count} is damaged")
            quarters = round(frame.rotation / 90)
            image = frame.to_image().rotate(90 * quarters, expand=True) if quarters else frame.to_image()
            yield float(count / rate) if frame.time is None else frame.time, image
            count += 1
    _check_complete(path, container, end)


def _check_complete(path: Path, container: av.container.InputContainer, end: float) -> None:
    """Compares what came with what the header promised: files without an index (MKV, WebM) just end early."""
    if container.duration is None:
        return
    start, promised = ((value or 0) / av.time_base for value in (container.start_time, container.duration))
    if end - start < 0.9 * promised - 0.5:  # durations are estimates: headers round them, some by whole frames
        raise UnreadableMedia(path, f"truncated: {end - start:.1f} s of {promised:.1f} s")


def _at_rate(timed: Iterable[tuple[float, Image.Image]], fps: float) -> Iterator[Image.Image]:
    """The frame that is on screen at 0, 1/fps, 2/fps, … seconds after the first."""
    tolerance = 1e-3 / fps  # timestamps are rounded, often to milliseconds
    first = shown = None
    ticks = 0
    for seconds, image in timed:
        first = seconds if first is None else first
        while shown is not None and ticks / fps < seconds - first - tolerance:
            yield shown
            ticks += 1
        shown, since = image, seconds
    if shown is not None and ticks / fps <= since - first + tolerance:
        yield shown


def _to_array(image: Image.Image, max_side: int | None, channels: int) -> np.ndarray:
    if max_side is not None and max(image.size) > max_side:
        ratio = max_side / max(image.size)
        size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image) if channels == 3 else np.asarray(image.convert("L"))[..., None]


def _to_tensor(path: Path, arrays: Sequence[np.ndarray]) -> Tensor:
    if not arrays:
        raise UnreadableMedia(path, "no frame could be decoded")
    if any(array.shape != arrays[0].shape for array in arrays):
        raise UnreadableMedia(path, "frames change their size on the way")
    pixels = torch.from_numpy(np.stack(arrays)).permute(3, 0, 1, 2)
    return pixels.to(torch.float32).div(127.5).sub(1)
