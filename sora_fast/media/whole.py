"""Whether a file is all there: what came, against what its container promises."""

import struct
from pathlib import Path
from typing import BinaryIO

import av
from av.container import InputContainer

from sora_fast.media.frames import UnreadableMedia

MATROSKA = "matroska,webm"
# Their "duration" is the time at which the file ends, in other containers it is its length.
ENDS = (MATROSKA, "nut", "asf")


def check_bytes(path: Path, container: InputContainer, stream: av.VideoStream) -> None:
    """Compares the file's size with what its header says of it, before anything is decoded."""
    indexed = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    needed = _stated_bytes(path, container) or indexed
    if needed > path.stat().st_size:
        raise UnreadableMedia(path, f"truncated: {path.stat().st_size} bytes of at least {needed}")


def check_boxes(path: Path) -> None:
    """Compares the size of an HEIF image with that of its outermost boxes: its decoder makes up what is missing."""
    size, end = path.stat().st_size, 0
    with path.open("rb") as file:
        while end + 16 <= size:
            file.seek(end)
            length, _, extended = struct.unpack(">I4sQ", file.read(16))
            length = extended if length == 1 else length
            if length < 8:  # 0: up to the end of the file, whatever it is
                return
            end += length
    if end > size:
        raise UnreadableMedia(path, f"truncated: {size} bytes of at least {end}")


def check_seconds(path: Path, container: InputContainer, start: float, end: float) -> None:
    """Compares what came, from the first packet's start to the last one's end, with the promised duration."""
    if container.duration is None or _stated_bytes(path, container):  # the size says it better
        return
    promised = promised_end(container, start) - start
    if end - start < 0.9 * promised - 0.5:  # durations are estimates: headers round them, some by whole frames
        raise UnreadableMedia(path, f"truncated: {end - start:.1f} s of {promised:.1f} s")


def promised_end(container: InputContainer, start: float) -> float:
    """When a file that begins at `start` ends by its header, in seconds. Few files begin at 0."""
    duration = (container.duration or 0) / av.time_base
    return duration if container.format.name in ENDS and duration > start else start + duration


def _stated_bytes(path: Path, container: InputContainer) -> int | None:
    """The size of the file, where its header states it."""
    with path.open("rb") as file:
        if container.format.name == MATROSKA:
            return _end_of_segment(file)
        if container.format.name == "flv":
            _, found, rest = file.read(4096).partition(b"\0\x08filesize\0")
            return int(struct.unpack(">d", rest[:8])[0]) if found else None
    return None


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
