"""What a file holds, without decoding it: how large its pictures are, how many, and when they are shown.

Of a video one frame is decoded, which says what no header does alone: how it is turned, how large it is to be shown,
and that there is a decoder for it. Decoded from end to end are animated images, HEIF, and streams without timestamps.
"""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from PIL import Image

from sora_fast.media.frames import Frame, UnreadableMedia
from sora_fast.media.images import image_frames, still_size
from sora_fast.media.timeline import Timeline
from sora_fast.media.videos import demuxed, video_frames


@dataclass(frozen=True)
class Probe:
    """height, width: of the pictures as they are to be shown. timeline: of all frames."""

    height: int
    width: int
    timeline: Timeline


def probe(path: str | PathLike[str]) -> Probe:
    """Raises UnreadableMedia and OSError, as `read_clip` does, for what can be known of a file without decoding it."""
    path = Path(path)
    if path.stat().st_size == 0:
        raise UnreadableMedia(path, "empty file (0 bytes)")
    try:
        return _still(path) or _moving(path)
    except UnreadableMedia:
        raise
    except Exception as error:  # as in read_clip
        raise UnreadableMedia(path, f"cannot be read: {error!r}") from error


def scaled(height: int, width: int, max_side: int | None) -> tuple[int, int]:
    """Height and width of a picture whose longer side is to have `max_side` pixels at most."""
    if max_side is None or max(height, width) <= max_side:
        return height, width
    ratio = max_side / max(height, width)
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def _still(path: Path) -> Probe | None:
    size = still_size(path)
    return size and Probe(*size, Timeline(1))


def _moving(path: Path) -> Probe:
    pictures = image_frames(path)
    if pictures is not None:
        return _decoded(list(map(_without_picture, pictures)))
    first = next(video_frames(path), None)
    if first is None:
        raise UnreadableMedia(path, "no frame could be decoded")
    timeline = demuxed(path)
    # A decoder that shows another frame first is not to be trusted with the others.
    if timeline is None or abs(timeline.first - first.start) > timeline.slack(0):
        return _decoded(list(map(_without_picture, video_frames(path))))
    return Probe(first.image.height, first.image.width, timeline)


def _without_picture(frame: Frame) -> tuple[Frame, tuple[int, int]]:
    return Frame(Image.new("1", (1, 1)), frame.start, frame.end, frame.rate), frame.image.size


def _decoded(frames: list[tuple[Frame, tuple[int, int]]]) -> Probe:
    last, (width, height) = frames[-1]
    starts = [frame.start for frame, _ in frames]
    return Probe(height, width, Timeline.of(starts, last.end, last.rate, can_seek=False))
