"""Videos, and images that Pillow does not read, through FFmpeg."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice, pairwise
from math import inf
from pathlib import Path
from typing import NamedTuple

import av
from av.container import InputContainer
from av.format import Flags
from av.stream import Disposition
from PIL import Image

from sora_fast.media.display import to_image
from sora_fast.media.frames import DEFAULT_RATE, Frame, UnreadableMedia
from sora_fast.media.pixels import Unshowable
from sora_fast.media.timeline import Timeline
from sora_fast.media.whole import MATROSKA, check_bytes, check_seconds, promised_end

# Of these, only the file says when its last frame ends.
NO_DURATIONS = (MATROSKA, "flv")

# FFmpeg's own decoders of these leave out the transparency.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


class Seek(NamedTuple):
    """Where reading is to begin, in seconds: at the frame of `start`, give or take `slack`.

    beginning: of the video's first frame.
    """

    start: float
    slack: float
    beginning: float


def video_frames(path: Path, seek: Seek | None = None) -> Iterator[Frame]:
    """The pictures of the file's first video. seek: without those before, which are decoded from the keyframe on."""
    with _opened(path) as (container, stream):
        if seek is not None:
            container.seek(round(seek.start / stream.time_base), stream=stream)
        frames = _decode(path, container, stream, seek)
        if container.format.name in NO_DURATIONS:
            frames = _lengthened(frames, container, seek and seek.beginning)
        yield from frames


def frames_from(path: Path, timeline: Timeline, number: int) -> Iterator[Frame]:
    """The pictures from frame `number` on: those that `video_frames` gives, without the ones before."""
    if timeline.can_seek and number:
        seek = Seek(timeline.start(number), timeline.slack(number), timeline.first)
        frames = video_frames(path, seek)
        first = next(frames, None)
        # Some containers lead to a keyframe that is too late.
        if first is not None and abs(first.start - seek.start) <= seek.slack:
            return chain((first,), frames)
    return islice(video_frames(path), number, None)


def demuxed(path: Path) -> Timeline | None:
    """When the pictures are shown, by the container: by its index, or by the headers of all packets.

    None where it does not say, as raw streams do not.
    """
    with _opened(path) as (container, stream):
        rate = _rate(container, stream)
        if rate is None:
            return None
        times, last = _indexed(stream) or _from_packets(container, stream)
        if not times:
            return None
        starts = [float(time * stream.time_base) for time in times]
        end = starts[-1] + (float(last * stream.time_base) if last else 1 / rate)
        if container.format.name in NO_DURATIONS and len(container.streams) == 1:
            end = max(end, promised_end(container, starts[0]))
        return Timeline.of(starts, end, rate, can_seek=True)


def _indexed(stream: av.VideoStream) -> tuple[list[int], int] | None:
    """Times of all frames and duration of the last, in the stream's units, of an MP4 whose frames last equally long.

    Its index has the order of decoding, in which equal steps are those of showing too.
    """
    if stream.start_time is None or not stream.frames or stream.frames != len(stream.index_entries):
        return None
    stamps = [entry.timestamp for entry in stream.index_entries if not entry.is_discard]
    steps = {after - before for before, after in pairwise(stamps)}
    if len(steps) != 1 or min(steps) <= 0:
        return None
    (step,) = steps
    return [stream.start_time + number * step for number in range(len(stamps))], step


def _from_packets(container: InputContainer, stream: av.VideoStream) -> tuple[list[int], int]:
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    if not packets or any(packet.pts is None for packet in packets):
        return [], 0
    packets.sort(key=lambda packet: packet.pts)
    return [packet.pts for packet in packets], packets[-1].duration or 0


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """A file and its first video. What goes wrong within the block is an UnreadableMedia."""
    try:
        # "file:" keeps a colon in a name from being read as a protocol; the whitelist keeps playlists off the network.
        # A "%d" in a name is a pattern to FFmpeg's reader of images.
        options = {"protocol_whitelist": "file"} | ({"pattern_type": "none"} if "%" in path.name else {})
        with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
            yield container, _picture_stream(path, container)
    except (Unshowable, Image.DecompressionBombError) as error:
        raise UnreadableMedia(path, str(error)) from error
    except av.error.FFmpegError as error:
        raise UnreadableMedia(path, _reason(path, error)) from error


def _reason(path: Path, error: av.error.FFmpegError) -> str:
    with path.open("rb") as file:
        if file.read(8)[4:] == b"ftyp":
            return f"corrupt or truncated video: {error.strerror}"
    return f"corrupt, or not a video or image: {error.strerror}"


def _picture_stream(path: Path, container: InputContainer) -> av.VideoStream:
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if container.format.name == "tty":  # FFmpeg plays any text file as a terminal's screen
        raise UnreadableMedia(path, "a text file, not a video or image")
    if not streams:
        raise UnreadableMedia(path, "no video in it (audio only)" if container.streams.audio else "no video in it")
    if streams[0].codec_context is None:
        raise UnreadableMedia(path, "FFmpeg has no decoder for it here")
    check_bytes(path, container, streams[0])
    return streams[0]


def _decode(path: Path, container: InputContainer, stream: av.VideoStream, seek: Seek | None) -> Iterator[Frame]:
    decode, rate = _decoder(path, stream), _rate(container, stream)
    step = 1 / (rate or DEFAULT_RATE)
    count, first, last = 0, inf, -inf
    for packet in container.demux():  # all streams: the container's duration is that of the longest
        if packet.pts is not None:
            first = min(first, float(packet.pts * packet.time_base))
            last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index != stream.index:  # stream_index says nothing in the packets that flush
            continue
        for frame in decode(packet):
            if seek is not None and (frame.time is None or frame.time < seek.start - seek.slack):
                continue
            if frame.is_corrupt or packet.is_corrupt:
                raise UnreadableMedia(path, f"corrupt or truncated video: frame {count} is damaged")
            start = count * step if frame.time is None else frame.time
            seconds = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else step
            image = to_image(frame, stream.sample_aspect_ratio)
            yield Frame(image, start, None if rate is None else start + seconds, rate)
            count += 1
    if first < inf and seek is None:
        check_seconds(path, container, first, last)


def _rate(container: InputContainer, stream: av.VideoStream) -> float | None:
    """Frames per second by the header; None for still images, and for raw streams that say nothing."""
    if container.format.name == "image2" or container.format.name.endswith("_pipe"):
        return None
    if container.format.flags & Flags.no_timestamps.value:  # a raw stream, for which FFmpeg would invent a rate
        rate = stream.codec_context.framerate
    else:
        rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def _decoder(path: Path, stream: av.VideoStream) -> Callable[[av.Packet], list[av.VideoFrame]]:
    name = ALPHA_DECODERS.get(stream.codec_context.name)
    if name is None or ("alpha_mode", "1") not in {(key.lower(), value) for key, value in stream.metadata.items()}:
        return av.Packet.decode
    try:
        decoder = av.CodecContext.create(name, "r")
    except av.codec.codec.UnknownCodecError:
        raise UnreadableMedia(
            path, f"a video with transparency, for which FFmpeg's decoder {name} is missing"
        ) from None
    decoder.extradata = stream.codec_context.extradata
    return lambda packet: decoder.decode(packet if packet.size else None)


def _lengthened(frames: Iterator[Frame], container: InputContainer, beginning: float | None) -> Iterator[Frame]:
    """The last frame stays until the file ends, if there is no sound that might last longer."""
    for frame, following in pairwise(chain(frames, (None,))):
        beginning = frame.start if beginning is None else beginning
        if following is None and frame.end is not None and len(container.streams) == 1:
            frame = replace(frame, end=max(frame.end, promised_end(container, beginning)))
        yield frame
