import json
import os
from pathlib import Path

import pytest

from sora_fast.media import Probe
from sora_fast.training.data import index
from sora_fast.training.data.index import probed
from tests.media.clips import smooth_video
from tests.media.files import greys, write_video


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    from sora_fast.media import write_media

    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "clips"
    folder.mkdir()
    video = write_video(folder / "a.mkv", greys(6), rate=50, durations=[0.1, 0.04, 0.2, 0.1, 0.1, 0.1])
    (folder / "b.mp4").write_bytes(b"nothing")
    return [video, folder / "b.mp4", write_media(folder / "c.png", smooth_video(frames=1))]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are looked at."""
    names, look = [], index.probe
    monkeypatch.setattr(index, "probe", lambda path: names.append(path.name) or look(path))
    return names


def test_what_was_found_out_is_kept_until_the_file_changes(files: list[Path], opened: list[str]) -> None:
    folder = files[0].parent
    first = probed(folder, files)
    assert [type(found) for found in first] == [Probe, str, Probe]
    assert sorted(opened) == ["a.mkv", "b.mp4", "c.png"]
    opened.clear()
    (place,) = (folder.parent / "cache" / "folders").iterdir()
    written = place.stat().st_mtime_ns
    assert probed(folder, files) == first
    assert place.stat().st_mtime_ns == written
    assert opened == ["b.mp4"], "a decoder may have been installed"
    opened.clear()
    files[1].write_bytes(files[0].read_bytes())
    os.utime(files[2], (1, 1))
    assert probed(folder, files)[1] == first[0]
    assert sorted(opened) == ["b.mp4", "c.png"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 0, "files": {"a.mkv": 3}}'])
def test_a_damaged_index_is_made_anew(files: list[Path], opened: list[str], damage: str) -> None:
    first = probed(files[0].parent, files)
    (place,) = (files[0].parent.parent / "cache" / "folders").iterdir()
    place.write_text(damage)
    opened.clear()
    assert probed(files[0].parent, files) == first
    assert len(opened) == 3
    assert json.loads(place.read_text())["format"] == index.FORMAT


def test_without_a_place_for_the_index(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = probed(files[0].parent, files)
    monkeypatch.setattr(index, "cache_folder", lambda: None)
    assert probed(files[0].parent, files) == first
