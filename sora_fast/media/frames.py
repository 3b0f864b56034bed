"""What every source of pictures yields, and which of them are on screen at a given rate."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from os import PathLike
from pathlib import Path

from PIL import Image

DEFAULT_RATE = 25  # of streams that carry neither timestamps nor a rate; FFmpeg assumes the same


class UnreadableMedia(ValueError):
    """A file that holds no usable video or image. `path` says which file, `reason` says why."""

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


@dataclass(frozen=True)
class Frame:
    """A picture and the interval in seconds for which it is on screen.

    end: None where nothing says how long it lasts: still images, and streams without any notion of time.
    rate: frames per second by the file's header; None where it states none.
    """

    image: Image.Image  # RGB, 8 bits, sRGB, upright, with square pixels
    start: float = 0.0
    end: float | None = None
    rate: float | None = None


def mean_rate(first: Frame, last: Frame, count: int) -> float | None:
    """Frames per second over `count` frames in a row: what the file states, if the frames agree within half of one."""
    if last.end is None:
        return None
    seconds, stated = last.end - first.start, last.rate
    if stated and abs(seconds - count / stated) <= 0.5 / stated:
        return stated
    return count / seconds if seconds > 0 else stated


def tolerance(fps: float) -> float:
    """Seconds by which a frame may be late at this rate: timestamps are rounded, often to milliseconds."""
    return min(1e-3, 0.25 / fps)


def at_rate(frames: Iterable[Frame], fps: float, *, beginning: float | None = None, first: int = 0) -> Iterator[Frame]:
    """What is on screen 0, 1/fps, 2/fps, … seconds after the beginning, until the last frame's end.

    beginning: where the first of the frames is not the first of the video, when that began; first: how many of the
    instants are over by then.
    """
    ticks = first
    for shown, following in pairwise(chain(frames, (None,))):
        if beginning is None:
            if following is None and shown.end is None:  # a still image
                yield shown
                return
            beginning = shown.start
        end = shown.end if following is None else following.start
        end = shown.start + 1 / DEFAULT_RATE if end is None else end
        while ticks == 0 or ticks / fps < end - beginning - tolerance(fps):
            yield replace(shown, start=ticks / fps, end=(ticks + 1) / fps, rate=fps)
            ticks += 1
