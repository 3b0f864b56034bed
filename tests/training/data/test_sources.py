import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_fast import media
from sora_fast.media import write_media
from sora_fast.training.data.sources import DataConfig, FolderSource, UnusableSample
from tests.media.files import greys, write_video
from tests.media.test_read import absurd_png

pytestmark = pytest.mark.filterwarnings("error")


def _video(frames: int = 4, height: int = 16, width: int = 24) -> torch.Tensor:
    ramp = torch.linspace(-1, 1, frames * height * width).view(1, frames, height, width)
    return ramp.expand(3, -1, -1, -1)


def _source(folder: Path, **options: object) -> FolderSource:
    return FolderSource(DataConfig(str(folder), **options))  # type: ignore[arg-type]


def test_reads_videos_images_and_captions(tmp_path: Path) -> None:
    write_media(tmp_path / "a.mp4", _video())
    (tmp_path / "a.txt").write_text("  a ramp\nin grey ")
    write_media(tmp_path / "deep" / "b.png", _video(frames=1))
    (tmp_path / "deep" / "b.json").write_text(json.dumps({"caption": "one frame"}))
    write_media(tmp_path / "c.gif", _video(frames=2))
    source = _source(tmp_path)
    assert [path.name for path in source.files] == ["a.mp4", "c.gif", "b.png"]
    assert source.captions == ["a ramp in grey", "", "one frame"]
    assert all(tuple(source[i].video.shape) == source.shape(i) for i in range(3))
    assert source.shapes[2] == (3, 1, 16, 24)
    assert not source.skipped
    video = source[0].video
    assert video.dtype == torch.float32
    assert -1 <= video.min() < -0.9
    assert 0.9 < video.max() <= 1


def test_the_cache_changes_nothing(tmp_path: Path) -> None:
    write_media(tmp_path / "a.mp4", _video())
    cached, read = _source(tmp_path), _source(tmp_path, cache_bytes=0)
    assert torch.equal(cached[0].video, read[0].video)


def test_fingerprint_changes_with_names_sizes_and_captions(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        for name in ("a", "b"):
            write_media(folder / f"{name}.png", _video(frames=1))
    seen = [_source(one).fingerprint]
    assert _source(other).fingerprint == seen[0]
    for change in (
        lambda: (one / "a.txt").write_text("a ramp"),
        lambda: (one / "a.txt").write_text("the ramp"),
        lambda: (one / "b.png").rename(one / "c.png"),
        lambda: write_media(one / "c.png", _video(frames=1, width=16)),
        lambda: write_media(one / "deep" / "d.png", _video(frames=1)),
        lambda: (one / "a.png").unlink(),
    ):
        change()
        seen.append(_source(one).fingerprint)
    assert len(set(seen)) == len(seen)


def test_limits(tmp_path: Path) -> None:
    write_media(tmp_path / "a.mp4", _video(frames=6, height=32, width=64))
    source = _source(tmp_path, max_frames=3, max_side=32, channels=1)
    assert source.shapes == [(1, 3, 16, 32)]


def test_bad_files_are_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = write_media(tmp_path / "good.png", _video(frames=1))
    whole = write_media(tmp_path / "whole.mp4", _video(frames=8)).read_bytes()
    (tmp_path / "whole.mp4").rename(tmp_path / "kept.mp4")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:-30])
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "noise.mkv").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "absurd.png").write_bytes(absurd_png())
    (tmp_path / ".hidden.mp4").touch()
    (tmp_path / "deep.png").write_bytes(good.read_bytes())
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name, text in {"list": "[]", "number": '{"caption": 3}', "broken": "{"}.items():
        (tmp_path / f"{name}.png").write_bytes(good.read_bytes())
        (tmp_path / f"{name}.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        source = _source(tmp_path)
    assert [path.name for path in source.files] == ["good.png", "kept.mp4"]
    skipped = {path.name: reason for path, reason in source.skipped.items()}
    assert set(skipped) == {
        "absurd.png",
        "cut.mp4",
        "cut.png",
        "zero.mp4",
        "noise.mkv",
        "list.png",
        "number.png",
        "deep.png",
        "broken.png",
    }
    assert "0 bytes" in skipped["zero.mp4"]
    assert "caption" in skipped["list.png"]
    assert "3" in skipped["number.png"]
    for name, reason in skipped.items():
        assert f"{name}: {reason}" in caplog.text


def test_captions_are_found_counted_and_what_is_not_used_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c", "d", "e"):
        write_media(tmp_path / f"{name}.png", _video(frames=1))
    (tmp_path / "a.TXT").write_bytes("\ufeffone".encode())
    (tmp_path / "b.png.txt").write_bytes("\ufefftwo".encode("utf-16-le"))
    (tmp_path / "c.JSON").write_bytes(b'\xef\xbb\xbf{"caption": "three"}')
    (tmp_path / "d.txt").write_text("four")
    (tmp_path / "d.json").write_text('{"caption": "other"}')
    for number in range(7):
        (tmp_path / f"stray{number}.txt").write_text("whose?")
    with caplog.at_level(logging.WARNING):
        source = _source(tmp_path)
    assert source.captions == ["one", "two", "three", "four", ""]
    assert source.summary == "5 files to train on, 4 with a caption and 1 without; 0 skipped"
    strays = ", ".join(f"{tmp_path}/stray{number}.txt" for number in range(5))
    assert f"belong to no video or image: {strays} and 2 more" in caplog.text
    assert f"not used, since another one goes first: {tmp_path}/d.json (d.txt is read)" in caplog.text


def test_links_are_followed_and_each_file_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clips, far = tmp_path / "clips", tmp_path / "far"
    write_media(clips / "a.png", _video(frames=1))
    write_media(far / "b.png", _video(frames=2)[:, 1:])
    (far / "b.txt").write_text("from afar")
    (clips / "again.png").symlink_to(clips / "a.png")
    (clips / "shared.txt").write_text("a ramp")
    (clips / "a.txt").symlink_to(clips / "shared.txt")
    (clips / "link").symlink_to(far)
    (clips / "loop").symlink_to(clips)
    (clips / "lost.mp4").symlink_to(tmp_path / "gone.mp4")
    with caplog.at_level(logging.WARNING):
        source = _source(clips)
    assert [path.relative_to(clips).as_posix() for path in source.files] == ["a.png", "link/b.png"]
    assert source.captions == ["a ramp", "from afar"]
    assert {path.name for path in source.skipped} == {"again.png", "loop", "lost.mp4"}
    for path, reason in source.skipped.items():
        assert f"{path}: {reason}" in caplog.text


@pytest.mark.parametrize(
    ("files", "fps", "rates", "rate", "said"),
    [
        ({"a.png": 1}, None, [None], None, ""),
        ({"a.mp4": 30, "b.png": 1}, None, [30.0, None], 30.0, "the videos run at 30 frames per second"),
        (
            {"a.mp4": 60, "b.mp4": 24, "c.mp4": 24, "d.gif": 10},
            None,
            [60.0, 24.0, 24.0, 10.0],
            24.0,
            "the videos run at different rates, 2 at 24, 1 at 60, 1 at 10 frames per second",
        ),
        ({"a.mp4": 60, "b.mp4": 24}, 12, [12.0, 12.0], 12.0, "the videos run at 12 frames per second"),
    ],
)
def test_the_rate_of_the_videos(
    files: dict[str, int], fps: float | None, rates: list[float | None], rate: float | None, said: str, tmp_path: Path
) -> None:
    for name, of_file in files.items():
        write_media(tmp_path / name, _video(frames=1 if name.endswith("png") else 6), fps=of_file)
    source = _source(tmp_path, fps=fps)
    assert source.rates == pytest.approx(rates)
    assert source.rate == pytest.approx(rate)
    assert source.rate_summary == said


def test_every_file_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.mp4", "b.png"):
        write_media(tmp_path / name, _video(frames=1))
    read: list[str] = []

    def counted(path: Path, **options: object) -> media.Clip:
        read.append(path.name)
        return read_clip(path, **options)  # type: ignore[arg-type]

    read_clip = media.read_clip
    monkeypatch.setattr(media, "read_clip", counted)
    source = _source(tmp_path)
    assert source.rate
    assert len([source[index] for index in (0, 1, 0)]) == 3
    assert read == ["a.mp4", "b.png"]


def test_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable video or image"):
        _source(tmp_path)
    (tmp_path / "zero.mp4").touch()
    with pytest.raises(ValueError, match=r"no usable video or image \(zero.mp4: empty file"):
        _source(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        _source(tmp_path / "absent")


def _long(path: Path, frames: int) -> Path:
    """Frames that can be told apart by their brightness, which H.264 keeps to within one."""
    pictures = [np.full((32, 32, 3), 5 + 4 * number, np.uint8) for number in range(frames)]
    return write_video(path, pictures, b_frames=2)


def _shown(video: torch.Tensor) -> list[int]:
    return (((video[0, :, 8, 8] + 1) * 127.5 - 5) / 4).round().int().tolist()


def test_clips_come_from_anywhere_and_in_proportion_to_the_length(tmp_path: Path) -> None:
    _long(tmp_path / "long.mp4", 50)
    _long(tmp_path / "short.mp4", 6)
    write_media(tmp_path / "still.png", _video(frames=1, height=32, width=32))
    source = _source(tmp_path, max_frames=8, clips="anywhere")
    assert [span.file for span in source.spans] == [0] * 6 + [1, 2]
    assert [source.shape(index)[1] for index in range(8)] == [8] * 6 + [6, 1]
    assert source.summary == "3 files to train on, 0 with a caption and 3 without, 8 clips an epoch; 0 skipped"
    assert source.rates == [8.0, 8.0, None]
    starts = set()
    for seed in range(100):
        shown = _shown(source.draw(0, np.random.default_rng(seed)).video)
        assert shown == list(range(shown[0], shown[0] + 8))
        starts.add(shown[0])
    assert {0, 42} <= starts
    assert len(starts) > 30
    again = [source.draw(0, np.random.default_rng(3)).video for _ in range(2)]
    assert torch.equal(*again)
    assert not source._cached_bytes, "of these none is asked for twice"


def test_no_clip_goes_over_a_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _long(tmp_path / "long.mp4", 40)
    whole = _source(tmp_path, max_frames=8, clips="anywhere")
    (tmp_path / "long.cuts").write_text("2.5\n3.0")  # 20 and 24 frames
    source = _source(tmp_path, max_frames=8, clips="anywhere")
    assert not caplog.messages
    assert source.fingerprint != whole.fingerprint
    assert [tuple(span) for span in source.spans] == [(0, 0, 20, 8)] * 2 + [(0, 20, 24, 4)] + [(0, 24, 40, 8)] * 2
    for index, span in enumerate(source.spans):
        for seed in range(20):
            shown = _shown(source.draw(index, np.random.default_rng(seed)).video)
            assert span.first <= shown[0]
            assert shown[-1] < span.last


def test_lists_of_cuts_of_nothing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_media(tmp_path / "a.png", _video(frames=1))
    (tmp_path / "b.cuts").write_text("1.0")
    _source(tmp_path, clips="anywhere")
    assert caplog.messages == [f"lists of scene cuts that belong to no file: {tmp_path}/b.cuts"]


def test_a_file_keeps_its_name_where_the_folder_moves(tmp_path: Path) -> None:
    write_media(tmp_path / "clips" / "deep" / "a.png", _video(frames=1))
    before = _source(tmp_path / "clips", clips="anywhere")
    (tmp_path / "clips").rename(tmp_path / "elsewhere")
    after = _source(tmp_path / "elsewhere", clips="anywhere")
    assert before.name(0) == after.name(0) == "deep/a.png"
    assert before.fingerprint == after.fingerprint


def test_what_its_header_did_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "cache"))
    clips = tmp_path / "clips"
    still = write_media(clips / "a.png", _video(frames=1))
    still.write_bytes(still.read_bytes()[:-30])
    _long(clips / "b.mp4", 9)
    _long(clips / "c.mp4", 9)
    source = _source(clips, clips="anywhere")
    assert len(source) == 3
    with pytest.raises(UnusableSample, match="truncated"):
        source[0]
    _long(clips / "b.mp4", 5)  # written anew while the run goes on
    shorter = source[1]
    assert shorter.video.shape[1] == 5
    assert shorter.note == "it has 5 frames of 32x32 where its header says 9 frames of 32x32; used as it is"
    write_video(clips / "c.mp4", greys(9))
    with pytest.raises(UnusableSample, match="9 frames of 32x48 where its header says 9 frames of 32x32"):
        source[2]


def test_the_first_frames_are_those_that_they_always_were(tmp_path: Path) -> None:
    _long(tmp_path / "a.mp4", 30)
    source = _source(tmp_path, max_frames=8)
    assert len(source) == 1
    assert _shown(source.draw(0, np.random.default_rng(0)).video) == _shown(source[0].video) == list(range(8))
