"""Pictures and files that the tests of reading share."""

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CORNERS = (
    (200, 40, 40),
    (40, 200, 40),
    (40, 40, 200),
    (200, 200, 40),
)  # top left, top right, bottom left, bottom right
EXACT = 0x2 | 0x40000 | 0x2000  # of swscale: bilinear, accurate rounding, full chroma
CODEC_OPTIONS = {
    "h264": {"crf": "1"},
    "libx265": {"x265-params": "lossless=1:log-level=none"},
    "libvpx": {"auto-alt-ref": "0"},  # which transparency needs
}

KINDS = {"flt": np.float32, "s16": np.int16, "s32": np.int32}  # of samples of sound

# Orientation of EXIF → how the stored picture, (H, W, 3), is to be seen. By the text of the standard: which side of the
# stored picture is the top and which the left of the scene.
UPRIGHT = {
    1: lambda picture: picture,
    2: lambda picture: picture[:, ::-1],
    3: lambda picture: picture[::-1, ::-1],
    4: lambda picture: picture[::-1],
    5: lambda picture: picture.swapaxes(0, 1),
    6: lambda picture: np.rot90(picture, -1),
    7: lambda picture: picture[::-1, ::-1].swapaxes(0, 1),
    8: lambda picture: np.rot90(picture, 1),
}


def four_corners(height: int = 32, width: int = 48) -> np.ndarray:
    """(H, W, 3) uint8: every corner has its colour, so that no turn or mirror image looks like another."""
    picture = np.empty((height, width, 3), np.uint8)
    top, left = height // 2, width // 2
    picture[:top, :left], picture[:top, left:], picture[top:, :left], picture[top:, left:] = CORNERS
    return picture


def greys(count: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Frames by whose brightness they can be told apart: 10, 20, 30, …"""
    return [np.full((height, width, 3), 10 * (index + 1), np.uint8) for index in range(count)]


def write_video(
    path: Path,
    pictures: Iterable[np.ndarray],
    *,
    codec: str = "h264",
    format: str = "yuv420p",
    rate: Fraction | int = 8,
    start: float = 0,
    options: dict[str, str] | None = None,
    durations: Sequence[float] | None = None,
    **tags: object,
) -> Path:
    """One stream of pictures of (H, W, 3) or (H, W, 4) uint8; `tags` are attributes of the stream."""
    with av.open(str(path), "w", options=options or {}) as container:
        add_pictures(
            container, pictures, codec=codec, format=format, rate=rate, start=start, durations=durations, **tags
        )()
    return path


def add_pictures(
    container: av.container.OutputContainer,
    pictures: Iterable[np.ndarray],
    *,
    codec: str = "h264",
    format: str = "yuv420p",
    rate: Fraction | int = 8,
    start: float = 0,
    durations: Sequence[float] | None = None,
    b_frames: int = 0,
    **tags: object,
) -> Callable[[], None]:
    """Adds a stream now, and returns what writes it: all streams have to be there before the first packet."""
    pictures = list(pictures)
    height, width = pictures[0].shape[:2]
    stream = container.add_stream(codec, rate=rate, options=CODEC_OPTIONS.get(codec, {}))
    stream.width, stream.height, stream.pix_fmt = width, height, format
    if codec == "h264":
        stream.codec_context.max_b_frames = b_frames
    for name, value in tags.items():
        setattr(stream, name, value)

    def write() -> None:
        packets = []
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24" if picture.shape[2] == 3 else "rgba")
            frame = frame.reformat(format=format, interpolation=EXACT)
            frame.pts, frame.time_base = index + round(start * rate), 1 / Fraction(rate)
            packets += stream.encode(frame)
        packets += stream.encode()
        moment = Fraction(start).limit_denominator(1000)
        for packet, seconds in zip(packets, durations or (), strict=False):
            packet.pts = packet.dts = int(moment / packet.time_base)
            packet.duration = int(Fraction(seconds).limit_denominator(1000) / packet.time_base)
            moment += Fraction(seconds).limit_denominator(1000)
        container.mux(packets)

    return write


def add_sound(container: av.container.OutputContainer, codec: str = "aac", seconds: float = 1.0) -> Callable[[], None]:
    """Silence, in a stream of its own; returns what writes it."""
    rate = 48000 if codec == "libopus" else 44100
    stream = container.add_stream(codec, rate=rate)
    stream.layout = "mono"

    def write() -> None:
        size = stream.codec_context.frame_size or 1024
        kind = stream.format.name
        for start in range(0, int(seconds * rate), size):
            samples = np.zeros((1, size), KINDS[kind.rstrip("p")])
            frame = av.AudioFrame.from_ndarray(samples, format=kind, layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

    return write
