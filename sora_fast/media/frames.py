"""What every source of pictures yields, and which of them are on screen at a given rate."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from PIL import Image


class UnreadableMedia(ValueError):
    """A file that holds no usable video or image. `path` says which file, `reason` says why."""

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


@dataclass(frozen=True)
class Frame:
    """A picture and the seconds for which it is on screen. A still image has no `end`.

    stated_rate: frames per second by the file's header; None where it states none.
    """

    image: Image.Image  # RGB, 8 bits, sRGB, upright, with square pixels
    start: float = 0.0
    end: float | None = None
    stated_rate: float | None = None


def mean_rate(first: Frame, last: Frame, count: int) -> float | None:
    """Frames per second over `count` frames in a row; what the file states, if that agrees within half a frame."""
    if last.end is None or last.end <= first.start:
        return last.stated_rate
    seconds, stated = last.end - first.start, last.stated_rate
    return stated if stated and abs(seconds - count / stated) <= 0.5 / stated else count / seconds


def at_rate(frames: Iterable[Frame], fps: float) -> Iterator[Frame]:
    """The frame that is on screen at 0, 1/fps, 2/fps, … seconds after the first one's start, up to the last one's end."""
    tolerance = min(1e-3, 0.25 / fps)  # timestamps are rounded, often to milliseconds
    first = shown = None
    ticks = 0
    for frame in frames:
        first = frame if first is None else first
        while shown is not None and ticks / fps < frame.start - first.start - tolerance:
            yield shown
            ticks += 1
        shown = frame
    if shown is None:
        return
    if ticks == 0:
        yield shown
        ticks += 1
    while shown.end is not None and ticks / fps < shown.end - first.start - tolerance:
        yield shown
        ticks += 1
