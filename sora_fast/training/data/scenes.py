"""Scene cuts: lists that stand beside videos, so that no clip of one goes over a cut.

Beside clip.mp4 that is clip.mp4.cuts or clip.cuts, a line for the seconds at which each new scene begins, or what
PySceneDetect's `list-scenes` writes, clip-Scenes.csv, of which the column "Start Time (seconds)" is read.
"""

import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sora_fast.media import Timeline

SUFFIX, TABLE, COLUMN = ".cuts", "-scenes.csv", "Start Time (seconds)"


class CutsError(ValueError):
    """A list of scene cuts that cannot be read."""


def is_cuts(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX or path.name.lower().endswith(TABLE)


def match_cuts(media: Sequence[Path], lists: Sequence[Path]) -> dict[Path, Path]:
    """Whose list is whose; of several, the first of those above."""
    by_name = {path.with_name(path.name.lower()): path for path in reversed(lists)}
    found = {}
    for medium in media:
        names = (f"{medium.name}{SUFFIX}", f"{medium.stem}{SUFFIX}", f"{medium.stem}{TABLE}")
        paths = (by_name.get(medium.with_name(name.lower())) for name in names)
        if path := next(filter(None, paths), None):
            found[medium] = path
    return found


def read_cuts(path: Path) -> list[float]:
    """Seconds from the video's beginning at which scenes begin, ascending. Raises CutsError, or OSError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        seconds = [float(value) for value in (_column(lines) if path.suffix.lower() == ".csv" else lines) if value]
    except (ValueError, KeyError) as error:
        raise CutsError(f"its list of scene cuts {path.name} cannot be read: {error}") from error
    if not all(math.isfinite(second) and second >= 0 for second in seconds):
        raise CutsError(f"its list of scene cuts {path.name} holds what is no time in seconds")
    return sorted(seconds)


def _column(lines: list[str]) -> list[str]:
    """PySceneDetect writes a line of all timecodes before the names of the columns, unless it is told not to."""
    header = next((number for number, line in enumerate(lines) if COLUMN in line), None)
    if header is None:
        raise KeyError(f'there is no column "{COLUMN}"')
    return [row[COLUMN] for row in csv.DictReader(lines[header:], skipinitialspace=True)]


def scenes(timeline: "Timeline", cuts: Sequence[float], fps: float | None) -> list[tuple[int, int]]:
    """First frame of each scene and the one past its last, of the frames that `fps` samples."""
    total = timeline.ticks(fps)
    bounds = {0, total, *(_first(timeline, second, fps) for second in cuts)}
    ordered = sorted(bound for bound in bounds if bound <= total)
    return list(itertools.pairwise(ordered))


def _first(timeline: "Timeline", second: float, fps: float | None) -> int:
    """The first frame that shows something of `second` or later. Lists are rounded to milliseconds."""
    begun = timeline.times - timeline.first
    frame = int((begun < second - 2e-3).sum())
    if fps is None or frame == timeline.count:
        return frame if frame < timeline.count else timeline.ticks(fps)
    tick = int(begun[frame] * fps)
    while timeline.shown(tick, fps) < frame:
        tick += 1
    return tick
