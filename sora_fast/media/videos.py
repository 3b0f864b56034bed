"""Videos, and images that Pillow does not read, through FFmpeg."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.stream import Disposition

from sora_fast.media.frames import Frame, UnreadableMedia

DEFAULT_RATE = Fraction(25)  # of streams that carry neither timestamps nor a rate; FFmpeg assumes the same


def video_frames(path: Path) -> Iterator[Frame]:
    """The pictures of the file's first video."""
    try:
        # "file:" keeps a colon in a name from being read as a protocol; the whitelist keeps playlists off the network.
        options = {"protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
            yield from _decode(path, container, _picture_stream(path, container))
    except av.error.FFmpegError as error:
        raise UnreadableMedia(path, _reason(path, error)) from error


def _reason(path: Path, error: av.error.FFmpegError) -> str:
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


def _decode(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[Frame]:
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
            start = float(count / rate) if frame.time is None else frame.time
            seconds = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else float(1 / rate)
            yield Frame(image, start, start + seconds, float(stream.average_rate) if stream.average_rate else None)
            count += 1
    _check_complete(path, container, end)


def _check_complete(path: Path, container: av.container.InputContainer, end: float) -> None:
    """Compares what came with what the header promised: files without an index (MKV, WebM) just end early."""
    if container.duration is None:
        return
    start, promised = ((value or 0) / av.time_base for value in (container.start_time, container.duration))
    if end - start < 0.9 * promised - 0.5:  # durations are estimates: headers round them, some by whole frames
        raise UnreadableMedia(path, f"truncated: {end - start:.1f} s of {promised:.1f} s")
