from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import pytest
from av.container import OutputContainer

from sora_fast.media import read_clip, read_media
from tests.media.files import add_pictures, add_sound, greys, write_video

COUNT = 8


def _shown(path: Path, **options: float) -> list[int]:
    """Which of the frames of `greys` are shown, from 1."""
    video = read_media(path, **options)
    return ((video[0, :, 8, 8] + 1) * 12.75).round().int().tolist()


# What else a file may hold: a function that adds a stream and returns what writes it.
Extra = Callable[[OutputContainer], Callable[[], object]]


def _attachment(container: OutputContainer) -> Callable[[], object]:
    container.add_attachment("font.ttf", "application/x-truetype-font", b"a font")
    return lambda: None


def _timecode(container: OutputContainer) -> Callable[[], object]:
    container.metadata["timecode"] = "01:00:00:00"  # becomes a track of its own
    return lambda: None


def _chapters(container: OutputContainer) -> Callable[[], object]:
    title = {"title": "the first"}
    container.set_chapters([{"id": 1, "start": 0, "end": 500, "time_base": Fraction(1, 1000), "metadata": title}])
    return lambda: None


def _data(container: OutputContainer) -> Callable[[], object]:
    """Telemetry, as drones write it."""
    stream = container.add_data_stream()

    def write() -> None:
        packet = av.Packet(b"48.1 N 11.6 E")
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 1000)
        container.mux(packet)

    return write


def _sound(codec: str) -> Extra:
    return lambda container: add_sound(container, codec)


STREAMS: list[tuple[str, str, Extra]] = [
    ("mp4", "h264", _sound("aac")),
    ("mov", "h264", _sound("pcm_s16le")),
    ("mkv", "h264", _sound("aac")),
    ("webm", "libvpx-vp9", _sound("libopus")),
    ("ts", "h264", _sound("aac")),
    ("avi", "mpeg4", _sound("mp3")),
    ("nut", "mpeg4", _sound("pcm_s16le")),
    ("mov", "h264", _timecode),
    ("mp4", "h264", _timecode),
    ("mp4", "h264", _chapters),
    ("mkv", "h264", _chapters),
    ("mkv", "h264", _attachment),
    ("ts", "h264", _data),
]


@pytest.mark.parametrize("first", ["pictures", "other"])
@pytest.mark.parametrize(
    ("suffix", "codec", "extra"), STREAMS, ids=[f"{s}-{c}-{index}" for index, (s, c, _) in enumerate(STREAMS)]
)
def test_every_frame_comes_whatever_else_the_file_holds(
    tmp_path: Path, suffix: str, codec: str, extra: Extra, first: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        # With frames that wait for later ones: the last come only when the decoder is flushed.
        pictures = lambda container: add_pictures(container, greys(COUNT), codec=codec, b_frames=2)  # noqa: E731
        writing = [add(container) for add in ((pictures, extra) if first == "pictures" else (extra, pictures))]
        for write in writing:
            write()
    assert _shown(path) == list(range(1, COUNT + 1))
    assert _shown(path, max_frames=3) == [1, 2, 3]
    assert read_clip(path).fps == (8 if suffix != "avi" else 8 / 1.125)  # FFmpeg's AVI with sound leaves a gap


def _fragmented(*flags: str) -> dict[str, str]:
    return {"movflags": "+".join(("frag_keyframe", *flags))}


STARTS = [
    ("mp4", "h264", {}),
    ("mp4", "h264", _fragmented("empty_moov", "default_base_moof")),
    ("mp4", "h264", _fragmented("delay_moov")),
    ("mp4", "h264", _fragmented("dash", "global_sidx")),
    ("mov", "h264", {}),
    ("mkv", "h264", {}),
    ("webm", "libvpx-vp9", {}),
    ("nut", "h264", {}),
    ("ts", "h264", {}),
    ("flv", "h264", {}),
    ("asf", "mpeg4", {}),
    ("ivf", "libvpx-vp9", {}),
]


@pytest.mark.parametrize("start", [0, 10, 100_000])
@pytest.mark.parametrize(("suffix", "codec", "options"), STARTS)
def test_time_need_not_begin_at_zero(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str], start: int
) -> None:
    path = write_video(tmp_path / f"a.{suffix}", greys(COUNT), codec=codec, start=start, options=options)
    assert _shown(path) == list(range(1, COUNT + 1))
    assert read_clip(path).fps == pytest.approx(8, rel=0.01)
    assert _shown(path, fps=4) == [1, 3, 5, 7]
    assert _shown(path, fps=8) == list(range(1, COUNT + 1))


def test_segments_as_a_segmenter_cuts_them(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "%d.mkv"), "w", format="segment", options={"segment_time": "1"}) as container:
        add_pictures(container, greys(24), gop_size=8)()
    shown = [_shown(tmp_path / f"{part}.mkv") for part in range(3)]
    assert shown == [list(range(part * 8 + 1, part * 8 + 9)) for part in range(3)]


# Frames of unequal duration: 0.1 s, 0.1 s, 2 s.
DURATIONS = (0.1, 0.1, 2.0)


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "h264"), ("mov", "h264"), ("mkv", "h264"), ("webm", "libvpx-vp9"), ("flv", "h264")]
)
@pytest.mark.parametrize("start", [0, 10])
def test_a_frame_lasts_as_long_as_the_file_says(tmp_path: Path, suffix: str, codec: str, start: int) -> None:
    path = write_video(tmp_path / f"a.{suffix}", greys(3), codec=codec, rate=10, start=start, durations=DURATIONS)
    assert _shown(path) == [1, 2, 3]
    assert _shown(path, fps=2) == [1, 3, 3, 3, 3]
    assert _shown(path, fps=10) == [1, 2] + [3] * 20
    assert read_clip(path).fps == pytest.approx(3 / 2.2, rel=0.01)
    assert read_clip(path, max_frames=2).fps == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), 24, Fraction(30000, 1001), 30, 60])
@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "h264"), ("mkv", "h264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("ts", "h264")]
)
def test_its_own_rate_takes_every_frame_once(tmp_path: Path, suffix: str, codec: str, rate: Fraction) -> None:
    """Though some containers round times to milliseconds."""
    path = write_video(tmp_path / f"a.{suffix}", greys(20), codec=codec, rate=rate)
    assert read_clip(path).fps == pytest.approx(float(rate), rel=1e-3)
    assert _shown(path, fps=float(rate)) == list(range(1, 21))


def test_raw_streams(tmp_path: Path) -> None:
    with_a_rate = write_video(tmp_path / "a.h264", greys(4))
    assert read_clip(with_a_rate).fps == 8 and _shown(with_a_rate, fps=4) == [1, 3]
    without = write_video(tmp_path / "a.mjpeg", greys(4), codec="mjpeg", format="yuvj420p")
    assert read_clip(without).fps is None and _shown(without) == [1, 2, 3, 4]
    assert _shown(without, fps=25) == [1, 2, 3, 4]


@pytest.mark.parametrize(("suffix", "codec", "format"), [("tga", "targa", "bgr24"), ("jp2", "jpeg2000", "rgb24")])
def test_still_images_have_no_rate(tmp_path: Path, suffix: str, codec: str, format: str) -> None:
    path = write_video(tmp_path / f"a.{suffix}", greys(1), codec=codec, format=format)
    for fps in (None, 1000):
        clip = read_clip(path, fps=fps)
        assert clip.fps is None and clip.video.shape == (3, 1, 32, 48)


def test_a_name_that_looks_like_a_pattern_stands_for_itself(tmp_path: Path) -> None:
    for name in ("a001.tga", "a002.tga", "a%03d.tga"):
        pictures = greys(2)[1:] if "%" in name else greys(1)
        write_video(tmp_path / "b.tga", pictures, codec="targa", format="bgr24").rename(tmp_path / name)
    assert _shown(tmp_path / "a%03d.tga") == [2]
    assert _shown(write_video(tmp_path / "b.mp4", greys(2)).rename(tmp_path / "b%d.mp4")) == [1, 2]
