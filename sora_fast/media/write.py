"""Tensors, written to disk as videos and images."""

import errno
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import cycle, islice, pairwise
from os import PathLike
from pathlib import Path

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import Colorspace
from PIL import Image
from torch import Tensor

from sora_fast.files import beside, replacing, trial_folder

log = logging.getLogger(__name__)

TRIAL_FRAMES = 64  # x264 looks 40 frames ahead: it asks no more of a longer clip


class UnwritableMedia(ValueError):
    """A file that cannot be written as asked. `path` says which file, `reason` says why."""

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


def write_media(path: str | PathLike[str], video: Tensor, *, fps: float = 8, scale: int = 1) -> Path:
    """Writes a video or image as the suffix of `path` says: .mp4 (H.264), .gif (loops), or .png (one frame).

    Args:
        video: (C, T, H, W) float in [-1, 1], clamped; C is 1 or 3.
        fps: frames per second. A GIF counts in hundredths of a second, so its frames last longer and shorter in turn,
            and equal ones are merged; it keeps the rate up to 50, above which it plays 50. This is logged, once.
        scale: every pixel becomes scale × scale pixels; small frames are hard to look at otherwise.

    Returns:
        The path. Folders on the way are made. H.264 needs even sides: an odd one has its last row or column repeated.

    Raises:
        UnwritableMedia: what the format, its encoder or the disk refuses; a file that was there is still there.
        ValueError: what no format takes.
    """
    return _written(Path(path), to_pixels(video), video.shape[1], fps, scale)


def write_frames(
    path: str | PathLike[str], pieces: Iterable[Tensor], *, frames: int, fps: float = 8, scale: int = 1
) -> Path:
    """As `write_media`, of a video that comes in pieces (C, t, H, W): each is written before the next one is asked for,
    but by a .gif, which takes all of them first to choose its colours.

    Args:
        frames: of all pieces. fps, scale: as for `write_media`, and so is what is raised.
    """
    return _written(Path(path), (frame for piece in pieces for frame in to_pixels(piece)), frames, fps, scale)


def _written(path: Path, pixels: Iterable[np.ndarray], count: int, fps: float, scale: int) -> Path:
    encoder = _encoder(path, count, fps, scale)
    with _refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            encoder.write(partial, (frame.repeat(scale, axis=0).repeat(scale, axis=1) for frame in pixels))
    return path


def check_output(
    path: str | PathLike[str],
    *,
    frames: int,
    height: int,
    width: int,
    channels: int = 3,
    fps: float = 8,
    scale: int = 1,
) -> float:
    """Tries whatever `write_media` could fail on, before the work is done whose result it is to write.

    Blank frames are written beside `path`, to a file that is then removed. `path` itself is not touched, and of folders
    that are not there yet none is left.

    Args:
        frames, height, width, channels: of the video. fps, scale: as for `write_media`.

    Returns:
        The frames per second that will be played, which a format may not have as asked.

    Raises:
        UnwritableMedia, ValueError: as `write_media` does. MemoryError: frames that are too large to be made.
    """
    path = Path(path)
    for name, value in {"frames": frames, "height": height, "width": width}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
    encoder = _encoder(path, min(frames, TRIAL_FRAMES), fps, scale)
    blanks = [np.broadcast_to(np.uint8(level), (height * scale, width * scale, channels)) for level in (0, 255)]
    with _refusals(path), trial_folder(path.parent):
        target = Path(os.path.realpath(path))
        _check_target(target)
        with beside(target) as partial:
            encoder.write(partial, islice(cycle(blanks), encoder.count))
    return encoder.played


def keep_unwritten(video: Tensor, folders: Sequence[Path]) -> Path:
    """Saves a video that could not be written, in the first of `folders` that takes it; OSError if none does.

    Returns the file: (C, T, H, W) float32, for `numpy.load`.
    """
    failures = []
    for folder in folders:
        kept = None
        try:
            descriptor, kept = tempfile.mkstemp(prefix="unwritten-", suffix=".npy", dir=folder)
            with open(descriptor, "wb") as file:
                np.save(file, video.detach().to("cpu", torch.float32).numpy())
            return Path(kept)
        except OSError as error:
            failures.append(f"{folder}: {error.strerror or error}")
            if kept is not None:
                os.unlink(kept)
    raise OSError(f"nor could the result be kept elsewhere ({'; '.join(failures)})")


def to_pixels(video: Tensor) -> np.ndarray:
    """(C, T, H, W) float in [-1, 1], C 1 or 3, → (T, H, W, C) uint8. Values outside are clamped; NaN is an error."""
    if video.ndim != 4 or video.shape[0] not in (1, 3) or 0 in video.shape:
        raise ValueError(f"video must be (C, T, H, W) with C = 1 or 3, none of them empty; got {tuple(video.shape)}")
    video = video.detach().to("cpu", torch.float32)
    if video.isnan().any():
        raise ValueError(f"video holds {int(video.isnan().sum())} NaN among its {video.numel()} values")
    levels = (video.clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous().numpy()


# Formats. Each is made for `count` frames at `fps`, which it may refuse by a ValueError, says at what rate they will be
# `played`, and writes them, (H, W, C) uint8 each.


@dataclass(frozen=True)
class _Mp4:
    count: int
    fps: float

    QUALITY = "16"  # x264's crf: no artefact to be seen even on tiny frames, whose files are small anyway
    SLOWEST = Fraction(1, 10_000)  # FFmpeg counts 16,384 a second at least, and what it counts must fit 32 bits
    LARGEST = 2**31 - 1  # numerator and denominator of a rate

    def __post_init__(self) -> None:
        if self.rate < self.SLOWEST or max(self.rate.as_integer_ratio()) > self.LARGEST:
            raise ValueError(
                f"{self.fps:g} frames per second: an .mp4 holds rates from {float(self.SLOWEST):g} to {self.LARGEST:g}"
            )

    @property
    def rate(self) -> Fraction:
        """As NTSC's 30000/1001 are written; below one frame a second, what is rounded is its length."""
        exact = Fraction(self.fps)
        return exact.limit_denominator(1001) if exact >= 1 else 1 / (1 / exact).limit_denominator(1001)

    @property
    def played(self) -> float:
        return float(self.rate)

    def write(self, path: Path, frames: Iterable[np.ndarray]) -> None:
        # What is shown of the stream is counted so many times a second, 1,000 by default: at thousands of frames in one
        # that cut some off, or all.
        options = {"movflags": "+faststart", "movie_timescale": str(max(1000, self.rate.numerator))}
        # "file:" keeps a colon in a name from being read as a protocol.
        with av.open(f"file:{path}", "w", format="mp4", options=options) as container:
            stream = container.add_stream("h264", rate=self.rate, options={"crf": self.QUALITY})
            for index, frame in enumerate(frames):
                if index == 0:
                    self._open(stream, *frame.shape[:2])
                container.mux(stream.encode(self._prepared(frame)))
            container.mux(stream.encode())

    def _open(self, stream: av.VideoStream, height: int, width: int) -> None:
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        stream.colorspace = Colorspace.ITU709  # said aloud, since players guess by size when it is not
        try:
            stream.codec_context.open()
        except FFmpegError as error:
            raise ValueError(f"H.264 takes no frames of {height}x{width} pixels (height x width)") from error

    def _prepared(self, frame: np.ndarray) -> av.VideoFrame:
        height, width = frame.shape[:2]
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        rgb = np.ascontiguousarray(np.broadcast_to(even, (*even.shape[:2], 3)))
        return av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709
        )


@dataclass(frozen=True)
class _Gif:
    count: int
    fps: float

    SHORTEST, LONGEST = 2, 2**16 - 1  # hundredths of a second; browsers show a shorter frame for ten of them
    LARGEST = 2**16 - 1  # pixels

    def __post_init__(self) -> None:
        if self._time > self.LONGEST:
            raise ValueError(
                f"{self.fps:g} frames per second: a .gif shows no frame for longer than {self.LONGEST / 100} seconds"
            )

    @property
    def _time(self) -> Fraction:
        """Of a frame, in hundredths of a second."""
        return max(100 / Fraction(self.fps), Fraction(self.SHORTEST))

    @property
    def played(self) -> float:
        return float(100 / self._time)

    @property
    def times(self) -> list[int]:
        """Whole hundredths of a second, one number a frame: each frame ends within half of one of where it should."""
        return [end - start for start, end in pairwise(round(index * self._time) for index in range(self.count + 1))]

    def write(self, path: Path, frames: Iterable[np.ndarray]) -> None:
        images = map(_image, frames)
        first = next(images)
        if max(first.size) > self.LARGEST:
            raise ValueError(f"a .gif has no side of more than {self.LARGEST} pixels, got {first.width}x{first.height}")
        first.save(path, save_all=True, append_images=images, duration=[10 * time for time in self.times], loop=0)


@dataclass(frozen=True)
class _Png:
    count: int
    fps: float

    def __post_init__(self) -> None:
        if self.count != 1:
            raise ValueError(f"a .png holds one frame, got {self.count}; write a .gif or an .mp4")

    @property
    def played(self) -> float:
        return self.fps

    def write(self, path: Path, frames: Iterable[np.ndarray]) -> None:
        for frame in frames:
            _image(frame).save(path)


FORMATS = {".mp4": _Mp4, ".gif": _Gif, ".png": _Png}


def _encoder(path: Path, count: int, fps: float, scale: int) -> _Mp4 | _Gif | _Png:
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive and finite, got {fps}")
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale must be a whole number of at least 1, got {scale}")
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UnwritableMedia(path, f"it must end in {', '.join(FORMATS)}")
    with _refusals(path):
        encoder = FORMATS[suffix](count, fps)
    if count > 1 and not math.isclose(encoder.played, fps, rel_tol=1e-3):
        _say_played(suffix, fps, encoder.played)
    return encoder


@cache
def _say_played(suffix: str, asked: float, played: float) -> None:
    """Once for a rate, though a clip is tried first and written then, and is perhaps one of many."""
    log.warning("%g frames per second are asked for; a %s plays at %g", asked, suffix, played)


def _image(frame: np.ndarray) -> Image.Image:
    return Image.fromarray(frame.squeeze(-1) if frame.shape[-1] == 1 else frame)


def _check_target(path: Path) -> None:
    """The name must be free to be taken, or that of a file which may be replaced."""
    if path.is_dir():
        raise ValueError("it is a folder; name a file in it")
    try:
        path.open("xb").close()
        path.unlink()
    except FileExistsError:
        if not path.is_file():
            raise ValueError("something is there that is not a file") from None
        if not os.access(path, os.W_OK):
            raise ValueError("it exists and cannot be written to") from None


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # an encoder meets what its author did not think of
        raise UnwritableMedia(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in errno.errorcode:
        return f"cannot be written: {os.strerror(error.errno)}"
    if isinstance(error, ValueError) and not isinstance(error, FFmpegError):
        return str(error)
    return f"cannot be encoded: {error.strerror if isinstance(error, FFmpegError) else repr(error)}"
