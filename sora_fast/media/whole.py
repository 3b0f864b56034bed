"""Whether a video is all there: what came, against what its container promises."""

from pathlib import Path
from typing import BinaryIO

import av
from av.container import InputContainer

from sora_fast.media.frames import UnreadableMedia

MATROSKA = "matroska,webm"
# Their "duration" is the time at which the file ends, in other containers it is its length.
ENDS = (MATROSKA, "nut", "asf")


def check_bytes(path: Path, container: InputContainer, stream: av.VideoStream) -> None:
    """Compares the file's size with the places that its header names, before anything is decoded."""
    needed = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if container.format.name == MATROSKA:  # has no index of everything
        with path.open("rb") as file:
            needed = _end_of_segment(file) or 0
    if needed > path.stat().st_size:
        raise UnreadableMedia(path, f"truncated: {path.stat().st_size} bytes of at least {needed}")


def check_seconds(path: Path, container: InputContainer, end: float) -> None:
    """Compares the time at which the last packet ends with the promised one: some files just end early."""
    if container.duration is None:
        return
    start, promised = promised_seconds(container)
    if end - start < 0.9 * (promised - start) - 0.5:  # durations are estimates: headers round them, some by frames
        raise UnreadableMedia(path, f"truncated: {end - start:.1f} s of {promised - start:.1f} s")


def promised_seconds(container: InputContainer) -> tuple[float, float]:
    """When the file begins and ends, as its header says. Files need not begin at 0."""
    start, duration = ((value or 0) / av.time_base for value in (container.start_time, container.duration))
    return start, duration if container.format.name in ENDS and duration > start else start + duration


def _end_of_segment(file: BinaryIO) -> int | None:
    """Where the content of a Matroska file ends; None if the header leaves it open, as that of a live recording."""
    for _ in range(2):  # the EBML header, then the segment; of each the name, then the size
        _number(file)
        size = _number(file)
        if size is None:
            return None
        end = file.tell() + size
        file.seek(end)
    return end


def _number(file: BinaryIO) -> int | None:
    """EBML's integers: as many zero bits as bytes follow, a marker, the number; all ones mean "unknown"."""
    first = file.read(1)[0]
    length = 9 - first.bit_length()
    value = int.from_bytes(bytes([first]) + file.read(length - 1), "big")
    value &= (1 << 7 * length) - 1
    return None if value == (1 << 7 * length) - 1 else value
