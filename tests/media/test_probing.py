"""What is known of a file before it is decoded, and clips from the middle, beside what decoding all of it gives."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sora_fast.media import UnreadableMedia, probe, read_clip, videos, write_media
from tests.media.clips import smooth_video
from tests.media.files import add_pictures, add_sound, greys, write_video

COUNT = 20
UNEVEN = [0.1, 0.04, 0.2, 0.1] * 5


def _with_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        writers = add_pictures(container, greys(COUNT)), add_sound(container, seconds=5.0)
        for write in writers:
            write()


def _long_groups(path: Path) -> None:
    """B-frames between keyframes that are seven frames apart."""
    with av.open(str(path), "w") as container:
        write = add_pictures(container, greys(COUNT), b_frames=2)
        container.streams.video[0].codec_context.gop_size = 7
        write()


FILES = {
    "even.mp4": lambda path: write_video(path, greys(COUNT)),
    "b_frames.mp4": _long_groups,
    "b_frames.mkv": _long_groups,
    "uneven.mp4": lambda path: write_video(path, greys(COUNT), rate=50, durations=UNEVEN),
    "uneven.mkv": lambda path: write_video(path, greys(COUNT), rate=50, durations=UNEVEN),
    "late.mov": lambda path: write_video(path, greys(COUNT), start=3),
    "late.flv": lambda path: write_video(path, greys(COUNT), start=3),
    "ntsc.mp4": lambda path: write_video(path, greys(COUNT), rate=30),
    "sound.mp4": _with_sound,
    "stream.ts": _long_groups,
    "old.avi": lambda path: write_video(path, greys(COUNT), codec="mpeg4"),
    "raw.h264": lambda path: write_video(path, greys(COUNT)),
    "web.webm": lambda path: write_video(path, greys(COUNT), codec="libvpx-vp9"),
    "frames.gif": lambda path: write_media(path, smooth_video(frames=COUNT)),
    "still.png": lambda path: write_media(path, smooth_video(frames=1)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, write in FILES.items():
        write(folder / name)
    return folder


@pytest.mark.parametrize("fps", [None, 3, 7.3, 60])
@pytest.mark.parametrize("name", FILES)
def test_a_clip_is_what_decoding_all_gives_there(folder: Path, name: str, fps: float | None) -> None:
    path = folder / name
    whole, found = read_clip(path, fps=fps).video, probe(path)
    assert (found.height, found.width) == tuple(whole.shape[2:])
    assert found.timeline.ticks(fps) == whole.shape[1]
    for start in {0, min(1, whole.shape[1] - 1), whole.shape[1] // 3, whole.shape[1] // 2, whole.shape[1] - 1}:
        clip = read_clip(path, fps=fps, start=start, max_frames=5, timeline=found.timeline).video
        assert torch.equal(clip, whole[:, start : start + 5]), start


@pytest.mark.parametrize(("name", "most"), [("b_frames.mp4", 3), ("b_frames.mkv", 3), ("even.mp4", 3)])
def test_what_is_left_out_is_not_shown(folder: Path, name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, show = [], videos.to_image
    monkeypatch.setattr(videos, "to_image", lambda *arguments: shown.append(0) or show(*arguments))
    timeline = probe(folder / name).timeline
    assert timeline.can_seek
    shown.clear()
    read_clip(folder / name, start=15, max_frames=2, timeline=timeline)
    assert len(shown) <= most


def test_a_wrong_timeline_gives_the_right_frames_all_the_same(folder: Path) -> None:
    """Of a file that was written anew, for example."""
    path, other = folder / "even.mp4", probe(folder / "uneven.mp4").timeline
    whole = read_clip(path).video
    assert torch.equal(read_clip(path, start=9, timeline=other).video, whole[:, 9:])


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_pictures_are_measured_as_they_are_seen(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png", "a.webp"):
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / name, exif=exif)
        found = probe(tmp_path / name)
        assert (found.height, found.width) == tuple(read_clip(tmp_path / name).video.shape[2:])


def test_a_still_is_not_decoded(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.png", smooth_video(frames=1))
    path.write_bytes(path.read_bytes()[:-30])
    assert probe(path).timeline.count == 1
    with pytest.raises(UnreadableMedia):
        read_clip(path)


@pytest.mark.parametrize("content", [b"", b"no video at all" * 50])
def test_what_is_no_video(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(UnreadableMedia):
        probe(path)
