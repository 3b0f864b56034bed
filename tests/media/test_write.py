import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from sora_fast.media import (
    UnwritableMedia,
    check_output,
    keep_unwritten,
    read_media,
    to_pixels,
    write,
    write_frames,
    write_media,
)
from tests.media.clips import noise, smooth_video

HALF_LEVEL = 0.51 / 127.5


@pytest.mark.parametrize("channels", [1, 3])
def test_mp4_comes_back_nearly_the_same(tmp_path: Path, channels: int) -> None:
    video = smooth_video(channels)
    path = write_media(tmp_path / "new" / "clip.mp4", video, fps=12)
    back = read_media(path, channels=channels)
    assert back.shape == video.shape and back.dtype == torch.float32
    # Colour has half the resolution of brightness.
    assert (back - video).abs().mean() < {1: 0.015, 3: 0.03}[channels]
    assert (back - video).abs().max() < {1: 0.12, 3: 0.25}[channels]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec.canonical_name == "h264" and stream.pix_fmt == "yuv420p" and stream.average_rate == 12


def test_mp4_colours_are_not_shifted(tmp_path: Path) -> None:
    for colour in [(1, -1, -1), (-1, 1, -1), (-1, -1, 1), (0.5, 0, -0.5), (1, 1, 1), (-1, -1, -1)]:
        video = torch.tensor(colour, dtype=torch.float32).view(3, 1, 1, 1).expand(3, 2, 16, 16)
        assert (read_media(write_media(tmp_path / "a.mp4", video)) - video).abs().max() < 3 / 127.5


def test_mp4_of_odd_sides_repeats_the_last_row_and_column(tmp_path: Path) -> None:
    video = smooth_video(1, 4, 33, 45)
    back = read_media(write_media(tmp_path / "a.mp4", video), channels=1)
    assert back.shape == (1, 4, 34, 46)
    assert (back[..., :33, :45] - video).abs().mean() < 0.015
    assert (back[..., 33, :45] - video[..., 32, :]).abs().mean() < 0.03


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".gif", ".png", ".GIF"])
def test_gif_and_png_lose_nothing_but_rounding(tmp_path: Path, suffix: str, channels: int, scale: int) -> None:
    video = noise(channels, 1 if suffix == ".png" else 6)
    if suffix != ".png" and channels == 3:
        video = (video > 0).float() * 2 - 1  # a GIF frame has 256 colours
    back = read_media(write_media(tmp_path / f"a{suffix}", video, scale=scale), channels=channels)
    enlarged = video.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    assert back.shape == enlarged.shape
    assert (back - enlarged).abs().max() < HALF_LEVEL


def _gif_times(path: Path) -> list[int]:
    """Milliseconds of each frame."""
    with Image.open(path) as image:
        return [frame.info["duration"] for frame in ImageSequence.Iterator(image)]


def test_gif_plays_at_its_rate_for_ever(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.gif", noise(), fps=10)
    assert _gif_times(path) == [100] * 6
    with Image.open(path) as image:
        assert image.info["loop"] == 0


@pytest.mark.parametrize("fps", [0.002, 0.3, 7, 8, 12, 23.976, 24, 29.97, 30, 40, 45, 50])
def test_gif_frames_end_when_they_should(tmp_path: Path, fps: float) -> None:
    """Within half a hundredth of a second, the last as much as the first."""
    ends = np.cumsum(_gif_times(write_media(tmp_path / "a.gif", noise(frames=40), fps=fps)))
    assert np.abs(ends - 1000 * np.arange(1, 41) / fps).max() <= 5.001


def test_gif_frames_of_a_thirtieth(tmp_path: Path) -> None:
    assert _gif_times(write_media(tmp_path / "a.gif", noise(frames=7), fps=30)) == [30, 40, 30, 30, 40, 30, 30]


@pytest.mark.parametrize("fps", [50.1, 60, 120, 1e30])
def test_a_gif_that_is_faster_than_browsers_play_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fps: float
) -> None:
    write._say_played.cache_clear()
    assert check_output(tmp_path / "a.gif", frames=6, height=12, width=16, fps=fps) == 50
    for _ in range(2):
        assert _gif_times(write_media(tmp_path / "a.gif", noise(), fps=fps)) == [20] * 6
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{fps:g} frames per second are asked for; a .gif plays at 50"]


@pytest.mark.parametrize("fps", [8, 30, 60])
def test_equal_gif_frames_become_one_as_long_as_all_of_them(tmp_path: Path, fps: float) -> None:
    levels = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1, 1, 1]) * 2.0 - 1
    times = _gif_times(write_media(tmp_path / "a.gif", levels.view(1, 10, 1, 1).expand(1, 10, 8, 8), fps=fps))
    ends = np.array([3, 5, 6, 10]) * 1000 / min(fps, 50)
    assert len(times) == 4 and np.abs(np.cumsum(times) - ends).max() <= 5.001
    still = write_media(tmp_path / "b.gif", torch.zeros(1, 10, 8, 8), fps=fps)
    assert _gif_times(still) == [pytest.approx(10 * 1000 / min(fps, 50), abs=5.001)]


@pytest.mark.parametrize(
    "fps",
    [1e-4, 0.00012345, 1e-3, 0.1, 0.3, 1 / 3, 1, 7.77, 23.976, 24000 / 1001, 29.97, 30, 59.94, 240, 1e5 + 0.5, 1e9],
)
def test_mp4_rates_come_back(tmp_path: Path, fps: float) -> None:
    video = noise(1, 5, 16, 16)
    assert check_output(tmp_path / "a.mp4", frames=5, height=16, width=16, fps=fps) == pytest.approx(fps, rel=1e-6)
    with av.open(write_media(tmp_path / "a.mp4", video, fps=fps)) as container:
        stream = container.streams.video[0]
        times = sorted(packet.pts * packet.time_base for packet in container.demux(stream) if packet.pts is not None)
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-6)
    assert [float(time - times[0]) for time in times] == pytest.approx([index / fps for index in range(5)], rel=1e-6)


@pytest.mark.parametrize("fps", [1000, 3000, 1e4, 1e6, 2**31 - 1])
def test_no_frame_is_lost_at_rates_of_thousands(tmp_path: Path, fps: float) -> None:
    """Clips that move little have frames that are decoded out of order, and so an edit list."""
    torch.manual_seed(0)
    for frames in (1, 3, 4, 9):
        video = torch.rand(3, 1, 16, 16) * 2 - 1 + 0.05 * torch.randn(3, frames, 16, 16)
        assert read_media(write_media(tmp_path / "a.mp4", video, fps=fps)).shape == video.shape


NAMES = {
    "a colon": "take:2",
    "a protocol": "https:x",
    "no UTF-8": os.fsdecode(b"caf\xe9"),
    "spaces and a percent sign": "50 %d of it",
    "a folder with a colon": "a:b/c/clip",
    "the longest name": "a" * 251,
    "the longest name in bytes": "\u8239" * 83,
}


@pytest.mark.parametrize("suffix", [".mp4", ".MP4", ".gif", ".png"])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_of_all_sorts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str) -> None:
    monkeypatch.chdir(tmp_path)
    video = smooth_video(1, 1 if suffix == ".png" else 2)
    check_output(name + suffix, frames=video.shape[1], height=48, width=64, channels=1)
    assert list(tmp_path.iterdir()) == []
    write_media(name + suffix, video)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == [name + suffix]
    assert (read_media(name + suffix, channels=1) - video).abs().mean() < 0.03


def test_a_link_stays_one_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path, link = tmp_path / "real" / "a.gif", tmp_path / "link.gif"
    link.symlink_to(path)
    for mode in (None, 0o640):
        check_output(link, frames=6, height=12, width=16)
        assert path.exists() == (mode is not None)
        if mode:
            path.chmod(mode)
        write_media(link, noise())
        assert link.is_symlink() and read_media(path).shape == (3, 6, 12, 16)
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(path.parent.iterdir()) == [path]


REFUSED = [
    ("a.mov", {}, r"a\.mov: it must end in \.mp4, \.gif, \.png"),
    ("mp4", {}, "must end in"),
    ("", {}, "must end in"),
    ("a.png", {"frames": 2}, "a .png holds one frame, got 2"),
    ("a.mp4", {"height": 16386}, "H.264 takes no frames of 16386x16 pixels"),
    ("a.mp4", {"height": 16383, "scale": 2}, "H.264 takes no frames of 32766x32 pixels"),
    ("a.mp4", {"height": 16384, "width": 16384}, "H.264 takes no frames of 16384x16384 pixels"),
    ("a.mp4", {"height": 10**8, "width": 10**8}, "H.264 takes no frames"),
    ("a.gif", {"width": 65536}, "a .gif has no side of more than 65535 pixels, got 65536x16"),
    ("a.mp4", {"fps": 1e30}, r"1e\+30 frames per second: an .mp4 holds rates from 0.0001 to 2.14748e\+09"),
    ("a.mp4", {"fps": 1e-5}, "1e-05 frames per second: an .mp4 holds rates from 0.0001"),
    ("a.mp4", {"fps": 5e-324}, "4.94066e-324 frames per second: an .mp4"),
    ("a.gif", {"fps": 0.0015}, "0.0015 frames per second: a .gif shows no frame for longer than 655.35 seconds"),
    ("a.mp4", {"fps": float("nan")}, "fps must be positive and finite, got nan"),
    ("a.gif", {"fps": 0}, "fps must be positive"),
    ("a.gif", {"scale": 1.5}, "scale must be a whole number"),
    ("folder.mp4", {}, "folder.mp4: it is a folder"),
    ("pipe.mp4", {}, "pipe.mp4: something is there that is not a file"),
    ("there.gif/a.mp4", {}, "nothing can be written to .*there.gif: Not a directory"),
    ("/proc/a.mp4", {}, "/proc/a.mp4: nothing can be written to /proc"),
    ("/proc/new/a.png", {}, "/proc/new/a.png: nothing can be written to /proc"),
    ("a" * 252 + ".mp4", {}, "File name too long"),
    ("new/" + "a" * 256 + "/a.mp4", {}, "File name too long"),
    ("nul\0.mp4", {}, "null"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=[f"{n[:20]!r} {o}" for n, o, _ in REFUSED])
def test_what_cannot_be_written_is_refused_beforehand(
    tmp_path: Path, name: str, options: dict[str, float], message: str
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "there.gif").write_bytes(b"there")
    before = sorted(tmp_path.rglob("*"))
    path = tmp_path / name if name else Path()
    with pytest.raises(ValueError, match=message) as raised:
        check_output(path, **{"frames": 1, "height": 16, "width": 16, **options})
    assert isinstance(raised.value, UnwritableMedia) == str(raised.value).startswith(f"{path}: ")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "there.gif").read_bytes() == b"there"


@pytest.mark.parametrize("option", ["frames", "height", "width", "channels"])
def test_sizes_that_there_cannot_be_are_named(tmp_path: Path, option: str) -> None:
    sizes = {"frames": 1, "height": 16, "width": 16, option: 0}
    with pytest.raises(ValueError, match=f"{option} must be"):
        check_output(tmp_path / "a.mp4", **sizes)


def test_frames_that_no_memory_holds_are_no_fault_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        check_output(tmp_path / "a.png", frames=1, height=10**8, width=10**8)
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gif").touch(mode=0o444)
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write to any file
    with pytest.raises(UnwritableMedia, match="it exists and cannot be written to"):
        check_output(tmp_path / "a.gif", frames=1, height=16, width=16)


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    video = noise(3, 1 if suffix == ".png" else 20, 64, 64)
    with _files_of_at_most(5000), pytest.raises(UnwritableMedia, match=f"a{suffix}: cannot be written: File too large"):
        write_media(path, video)
    with _files_of_at_most(50), pytest.raises(UnwritableMedia, match=r"nothing can be written to .*: File too large"):
        check_output(path, frames=video.shape[1], height=64, width=64)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_could_not_be_written_is_kept_where_there_is_room(tmp_path: Path) -> None:
    video = noise(3, 4, 64, 64)
    assert keep_unwritten(video.to(torch.bfloat16), [tmp_path / "absent", tmp_path]).parent == tmp_path
    kept = keep_unwritten(video, [Path("/proc"), tmp_path])
    assert kept.suffix == ".npy" and np.array_equal(np.load(kept), video.numpy())
    before = sorted(tmp_path.iterdir())
    with _files_of_at_most(5000), pytest.raises(OSError, match=r"elsewhere \(.*absent: No such file .*; .*written"):
        keep_unwritten(video, [tmp_path / "absent", tmp_path])
    assert sorted(tmp_path.iterdir()) == before


def test_pixels_are_clamped_and_rounded() -> None:
    video = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0]).view(1, 1, 1, 5)
    assert to_pixels(video)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_pixels(torch.zeros(3, 2, 4, 5, dtype=torch.bfloat16)).shape == (2, 4, 5, 3)


def test_errors_name_the_argument(tmp_path: Path) -> None:
    video = noise()
    for path, match in [("a.mov", r"a\.mov: it must end in \.mp4, \.gif, \.png"), ("a.png", "one frame, got 6")]:
        with pytest.raises(ValueError, match=match):
            write_media(tmp_path / path, video)
    for options in [{"fps": 0}, {"scale": 0}]:
        with pytest.raises(ValueError, match=next(iter(options))):
            write_media(tmp_path / "a.gif", video, **options)
    with pytest.raises(ValueError, match="1 NaN among"):
        write_media(tmp_path / "a.gif", torch.where(video == video.max(), torch.nan, video))
    for shape in [(6, 12, 16), (2, 6, 12, 16), (1, 0, 12, 16)]:
        with pytest.raises(ValueError, match="video must be"):
            write_media(tmp_path / "a.gif", torch.zeros(shape))
    assert list(tmp_path.iterdir()) == []


def test_frames_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one has gone to the encoder before the next piece is asked for; and the file is that of the whole."""
    video, encoded = smooth_video(3, 12), []
    prepared = write._Mp4._prepared
    monkeypatch.setattr(write._Mp4, "_prepared", lambda self, frame: encoded.append(1) or prepared(self, frame))

    def pieces() -> Iterator[torch.Tensor]:
        for start, stop in ((0, 1), (1, 5), (5, 12)):
            assert len(encoded) == start
            yield video[:, start:stop]

    for suffix in ("mp4", "gif"):
        encoded.clear()
        given = pieces() if suffix == "mp4" else iter(video.split(5, dim=1))
        path = write_frames(tmp_path / f"pieces.{suffix}", given, frames=12, fps=12, scale=2)
        whole = write_media(tmp_path / f"whole.{suffix}", video, fps=12, scale=2)
        assert torch.equal(read_media(path), read_media(whole))
    with pytest.raises(UnwritableMedia, match="1 NaN"):
        write_frames(tmp_path / "a.mp4", [torch.tensor([float("nan")]).view(1, 1, 1, 1)], frames=1)
    assert not (tmp_path / "a.mp4").exists()
