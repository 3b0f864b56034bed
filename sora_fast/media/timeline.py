"""When the frames of a video are on screen, known before any of them is decoded."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sora_fast.media.frames import DEFAULT_RATE, Frame, mean_rate, tolerance


@dataclass(frozen=True)
class Timeline:
    """Of `count` frames the seconds at which they begin: first + number · step, or where that is no rule, `starts`.

    end: of the last one; None where nothing says. rate: frames per second by the file's header, or None.
    can_seek: whether its times are those of the container, so that reading may begin in the middle.
    """

    count: int
    first: float = 0.0
    step: float = 0.0
    starts: tuple[float, ...] | None = None
    end: float | None = None
    rate: float | None = None
    can_seek: bool = False

    @staticmethod
    def of(starts: Sequence[float], end: float | None, rate: float | None, *, can_seek: bool) -> "Timeline":
        """From the times of all frames, in order."""
        count, first = len(starts), starts[0]
        step = (starts[-1] - first) / (count - 1) if count > 1 else 0.0
        # Timestamps are rounded, in some containers to milliseconds.
        even = all(abs(first + number * step - start) < 1e-6 for number, start in enumerate(starts))
        return Timeline(count, first, step, None if even else tuple(starts), end, rate, can_seek)

    @property
    def times(self) -> np.ndarray:
        """[count] seconds. Made anew each time: of many long videos they would fill the memory."""
        return np.asarray(self.starts) if self.starts else self.first + self.step * np.arange(self.count)

    @property
    def is_still(self) -> bool:
        """Whether it is one picture of no duration."""
        return self.count == 1 and self.end is None

    @property
    def mean_rate(self) -> float | None:
        """Frames per second over all frames, as `frames.mean_rate` has it; None where nothing says."""
        end = None if self.end is None else Frame(None, self.start(self.count - 1), self.end, self.rate)
        return end and mean_rate(Frame(None, self.first), end, self.count)

    def start(self, number: int) -> float:
        """Seconds at which a frame begins."""
        return self.starts[number] if self.starts else self.first + self.step * number

    def slack(self, number: int) -> float:
        """How far off a frame's time may be before it might be another frame's: a quarter of what is beside it."""
        around = np.diff(self.times[max(0, number - 1) : number + 2])
        return float(around.min()) / 4 if len(around) else 1e-3

    def ticks(self, fps: float | None) -> int:
        """How many frames `frames.at_rate` gives of it; all there are without a rate, and of a still image one."""
        if fps is None or self.is_still:
            return self.count
        end = self.start(self.count - 1) + 1 / DEFAULT_RATE if self.end is None else self.end
        seconds = end - self.first - tolerance(fps)
        ticks = max(1, int(seconds * fps))
        return ticks + 1 if ticks / fps < seconds else ticks

    def shown(self, tick: int, fps: float) -> int:
        """Which frame is on screen tick / fps seconds after the beginning, as `frames.at_rate` decides it."""
        return int(np.searchsorted(self.times[1:] - self.first - tolerance(fps), tick / fps, side="right"))
