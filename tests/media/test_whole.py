from pathlib import Path

import av
import numpy as np
import pytest

from sora_fast.media import UnreadableMedia, read_media
from tests.media.files import add_pictures, add_sound, write_video

FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
FASTSTART = {"movflags": "+faststart"}
CONTAINERS = [
    ("mp4", "h264", {}),
    ("mp4", "h264", FASTSTART),
    ("mp4", "h264", FRAGMENTED),
    ("mov", "mpeg4", FASTSTART),
    ("mkv", "h264", {}),
    ("webm", "libvpx-vp9", {}),
    ("avi", "mpeg4", {}),
    ("flv", "h264", {}),
]


def _noise(count: int) -> list[np.ndarray]:
    """So that every part of the file matters."""
    return [np.random.default_rng(i).integers(0, 256, (32, 48, 3), dtype=np.uint8) for i in range(count)]


@pytest.mark.parametrize("share", [0.4, 0.6, 0.97])
@pytest.mark.parametrize(
    ("suffix", "codec", "options", "start"),
    [(*container, start) for start in (0, 10) for container in CONTAINERS if container[0] != "avi" or start == 0],
)  # AVI always begins at 0
def test_what_is_cut_off_is_missed(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str], start: int, share: float
) -> None:
    path = write_video(tmp_path / f"a.{suffix}", _noise(40), codec=codec, start=start, options=options)
    assert read_media(path).shape[1] == 40
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UnreadableMedia, match="truncated"):
        read_media(path)


def test_a_live_recording_without_a_size_is_no_truncation(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", _noise(8), options={"live": "1"})
    assert read_media(path).shape[1] == 8


def test_what_follows_a_matroska_file_does_no_harm(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", _noise(8))
    path.write_bytes(path.read_bytes() + bytes(100))
    assert read_media(path).shape[1] == 8


def test_sound_that_ends_later_is_no_truncation(tmp_path: Path) -> None:
    for suffix in ("mkv", "mp4", "flv"):
        with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
            writing = [add_pictures(container, _noise(4)), add_sound(container, seconds=5)]
            for write in writing:
                write()
        assert read_media(tmp_path / f"a.{suffix}").shape[1] == 4
        assert read_media(tmp_path / f"a.{suffix}", fps=8).shape[1] == 4
