import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sora_fast.media import UnreadableMedia, read_clip, read_media, to_pixels, videos, write_media
from tests.helpers import examples
from tests.media.clips import noise as _noise
from tests.media.clips import smooth_video as _smooth_video


def _encode(path: Path, *, codec: str = "h264", frames: int = 40, options: dict[str, str] | None = None) -> Path:
    """Noise, so that every part of the file matters."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(frames):
            pixels = np.random.default_rng(index).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def _audio(path: Path, codec: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44100)
        for start in range(0, 44100, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 44100, start, Fraction(1, 44100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@examples(20)
@given(st.integers(1, 12), st.sampled_from([1.0, 2.0, 4.0, 5.0, 8.0, 10.0, 20.0]), st.integers(1, 30))
def test_fps_shows_the_latest_frame_of_each_instant(
    tmp_path_factory: pytest.TempPathFactory, frames: int, fps: float, max_frames: int
) -> None:
    # Ten frames a second; frame i is of level i.
    video = (torch.arange(frames) / 127.5 - 1).view(1, frames, 1, 1).expand(1, frames, 8, 8)
    path = write_media(tmp_path_factory.mktemp("fps") / "a.gif", video, fps=10)
    back = read_media(path, fps=fps, max_frames=max_frames, channels=1)
    # The last frame is on screen for a tenth of a second as well. One frame alone is a still image.
    instants = np.arange(0, frames / 10 - 1e-9, 1 / fps)[: max_frames if frames > 1 else 1]
    assert back.shape[1] == len(instants)
    levels = ((back[0, :, 0, 0] + 1) * 127.5).round().int().tolist()
    assert levels == np.floor(instants * 10 + 1e-6).astype(int).tolist()


def test_the_rate_of_a_clip(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv", "a.avi", "a.ts"):
        path = _encode(tmp_path / name, codec={"a.avi": "mpeg4"}.get(name, "h264"), frames=5)
        assert read_clip(path).fps == read_clip(path, max_frames=3).fps == 8
        assert read_clip(path, fps=2.5).fps == 2.5
        assert torch.equal(read_clip(path).video, read_media(path))
    assert read_clip(write_media(tmp_path / "a.gif", _noise(), fps=10)).fps == pytest.approx(10)
    assert read_clip(write_media(tmp_path / "a.png", _noise(frames=1)), fps=3).fps is None


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.webm", "a.ts"])
def test_containers_of_all_sorts(tmp_path: Path, name: str) -> None:
    path = _encode(tmp_path / name, codec={"a.avi": "mpeg4", "a.webm": "libvpx-vp9"}.get(name, "h264"))
    assert read_media(path).shape == (3, 40, 48, 64)
    assert read_media(path, max_frames=7).shape == (3, 7, 48, 64)
    assert read_media(path, fps=2).shape == (3, 10, 48, 64)
    assert torch.equal(read_media(path, fps=4), read_media(path)[:, ::2])


def test_a_stream_without_timestamps(tmp_path: Path) -> None:
    path = _encode(tmp_path / "a.h264")
    assert read_media(path).shape == (3, 40, 48, 64)


def test_names_that_look_like_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _encode(tmp_path / "clip:1.mp4", frames=3)
    monkeypatch.chdir(tmp_path)
    assert read_media("clip:1.mp4").shape[1] == 3


def test_max_side_scales_down_and_keeps_the_aspect(tmp_path: Path) -> None:
    video = _smooth_video(3, 2, 60, 100)
    path = write_media(tmp_path / "a.mp4", video)
    assert read_media(path, max_side=100).shape == read_media(path, max_side=500).shape == (3, 2, 60, 100)
    small = read_media(path, max_side=50)
    assert small.shape == (3, 2, 30, 50)
    assert (small - torch.nn.functional.avg_pool2d(video, 2)).abs().mean() < 0.03


def test_rotation_and_orientation_are_applied(tmp_path: Path) -> None:
    video = _smooth_video(1, 2, 32, 48)
    path = write_media(tmp_path / "a.mp4", video)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    one = 1 << 16
    upright = (0, one, 0, -one, 0, 0, 0, 0, 1 << 30)  # what a phone says that was held upright
    data[matrix : matrix + 36] = struct.pack(">9i", *upright)
    path.write_bytes(data)
    assert (read_media(path, channels=1) - video.rot90(-1, (2, 3))).abs().mean() < 0.015

    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to see it upright
    Image.fromarray(to_pixels(video)[0, ..., 0]).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert (read_media(tmp_path / "a.jpg", channels=1) - video[:, :1].rot90(-1, (2, 3))).abs().mean() < 0.015


def test_transparency_lies_on_black_and_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    Image.new("RGBA", (5, 4), (255, 255, 255, 0)).save(tmp_path / "a.png")
    assert (read_media(tmp_path / "a.png") == -1).all()
    Image.fromarray(np.full((4, 5), 0x8000, dtype=np.uint16)).save(tmp_path / "b.png")
    assert read_media(tmp_path / "b.png").unique().tolist() == [pytest.approx(0x80 / 127.5 - 1, abs=1e-6)]


def _broken_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Name → (content, what the reason must say)."""
    whole = {name: _encode(folder / name).read_bytes() for name in ("a.mp4", "a.mkv")}
    streamable = _encode(folder / "f.mp4", options={"movflags": "+faststart"}).read_bytes()
    png = write_media(folder / "a.png", _noise(3, 1, 32, 32)).read_bytes()
    gif = write_media(folder / "a.gif", _noise()).read_bytes()
    jpeg = io.BytesIO()
    Image.fromarray(to_pixels(_noise(3, 1, 64, 64))[0]).save(jpeg, "jpeg")
    scrambled, spoilt = bytearray(streamable), bytearray(png)
    middle = len(streamable) // 2
    scrambled[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
    spoilt[len(png) // 2] ^= 255
    return {
        "zero.mp4": (b"", "empty"),
        "zero.png": (b"", "empty"),
        "no_index.mp4": (whole["a.mp4"][: len(whole["a.mp4"]) * 6 // 10], "truncated"),
        "indexed.mp4": (streamable[: len(streamable) * 6 // 10], "truncated: "),
        "header.mp4": (streamable[:40], "no video in it"),
        "half.mkv": (whole["a.mkv"][: len(whole["a.mkv"]) * 6 // 10], "truncated: "),
        "scrambled.mp4": (bytes(scrambled), "corrupt"),
        "half.png": (png[: len(png) // 2], "truncated"),
        "spoilt.png": (bytes(spoilt), "corrupt"),
        "half.gif": (gif[: len(gif) // 2], "truncated"),
        "half.jpg": (jpeg.getvalue()[: len(jpeg.getvalue()) // 2], "truncated"),
        "letter.mp4": (b"Dear Sir or Madam,\n" * 50, "not a video or image"),
        "letter.txt": (b"Dear Sir or Madam,\n" * 50, "not a video or image"),
        "noise.mov": (np.random.default_rng(1).bytes(5000), "not a video or image"),
        "song.wav": (_audio(folder / "song.wav", "pcm_f32le").read_bytes(), "audio only"),
        "song.m4a": (_audio(folder / "song.m4a", "aac").read_bytes(), "audio only"),
    }


@pytest.fixture(scope="module")
def broken_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, str]]:
    return _broken_files(tmp_path_factory.mktemp("sources"))


def test_broken_files_are_named_with_their_reason(tmp_path: Path, broken_files: dict[str, tuple[bytes, str]]) -> None:
    reasons = {}
    for name, (content, _) in broken_files.items():
        path = tmp_path / name
        path.write_bytes(content)
        try:
            reasons[name] = f"read as {tuple(read_media(path).shape)}"
        except UnreadableMedia as error:
            reasons[name] = error.reason
            assert error.path == path and str(error) == f"{path}: {error.reason}"
    assert not {name: reason for name, reason in reasons.items() if broken_files[name][1] not in reason}


def test_an_indexed_file_is_known_to_be_truncated_before_its_end_is_reached(
    tmp_path: Path, broken_files: dict[str, tuple[bytes, str]]
) -> None:
    (tmp_path / "a.mp4").write_bytes(broken_files["indexed.mp4"][0])
    with pytest.raises(UnreadableMedia, match="truncated"):
        read_media(tmp_path / "a.mp4", max_frames=1)


def test_the_cover_of_a_song_is_no_video(tmp_path: Path) -> None:
    song = _audio(tmp_path / "plain.mp3", "mp3").read_bytes()
    cover = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(cover, "png")
    picture = (
        b"\0image/png\0\x03\0" + cover.getvalue()
    )  # ID3v2.3: text encoding, MIME type, front cover, no description
    frame = b"APIC" + struct.pack(">I", len(picture)) + b"\0\0" + picture
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    music = song[song.index(b"\xff\xfb") :]
    (tmp_path / "a.mp3").write_bytes(b"ID3\x03\0\0" + size + frame + music)
    with av.open(str(tmp_path / "a.mp3")) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(UnreadableMedia, match="audio only"):
        read_media(tmp_path / "a.mp3")


def test_a_sound_track_longer_than_the_pictures_is_no_truncation(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        pictures, sound = container.add_stream("h264", rate=8), container.add_stream("aac", rate=44100)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        for _ in range(4):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(pictures.encode())
        for start in range(0, 5 * 44100, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 44100, start, Fraction(1, 44100)
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    assert read_media(tmp_path / "a.mkv").shape == (3, 4, 48, 64)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("odd"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text"),
        OSError("gone"),
        MemoryError(),
        KeyError(3),
    ],
)
def test_whatever_a_decoder_fails_on_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = _encode(tmp_path / "a.mp4", frames=2)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(videos, "_decode", fail)
    with pytest.raises(UnreadableMedia) as raised:
        read_media(path)
    assert raised.value.reason == f"cannot be decoded: {error!r}"


def test_an_image_of_absurd_size_and_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(absurd_png())
    with pytest.raises(UnreadableMedia, match=r"too large an image: .*10000000000 pixels"):
        read_media(tmp_path / "a.png")
    with pytest.raises(UnreadableMedia, match="cannot be read: Is a directory"):
        read_media(tmp_path)


def absurd_png() -> bytes:
    """The beginning of a PNG of 100,000 × 100,000 pixels."""

    def chunk(content: bytes) -> bytes:
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT" + bytes(64))


def test_errors_name_the_argument(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_media(tmp_path / "nothing.mp4")
    write_media(tmp_path / "a.gif", _noise())
    for options in [{"max_frames": 0}, {"fps": -1.0}, {"max_side": 0}, {"channels": 2}]:
        with pytest.raises(ValueError, match=next(iter(options))):
            read_media(tmp_path / "a.gif", **options)
