import json
from pathlib import Path

import pytest

from sora_fast.training.data.captions import CaptionError, is_caption, match, read_caption

TEXT = "ein Ball – 球, é"


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", b"\xef\xbb\xbf"),
        ("utf-16-le", b"\xff\xfe"),
        ("utf-16-be", b"\xfe\xff"),
        ("utf-32-le", b"\xff\xfe\x00\x00"),
        ("utf-32-be", b"\x00\x00\xfe\xff"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.json", "a.Json"])
def test_byte_order_marks_are_understood(encoding: str, mark: bytes, name: str, tmp_path: Path) -> None:
    content = json.dumps({"caption": TEXT}, ensure_ascii=False) if name.lower().endswith("json") else f" {TEXT}\r\n"
    (tmp_path / name).write_bytes(mark + content.encode(encoding))
    assert read_caption(tmp_path / name) == TEXT


def test_marks_of_files_that_were_joined_go_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa red\n\xef\xbb\xbfball\n")
    assert read_caption(tmp_path / "a.txt") == "a red ball"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", "grün".encode("latin-1"), "cannot be read: 'utf-8' codec can't decode"),
        ("a.txt", "a ball".encode("utf-16-le"), "no text; save it as UTF-8"),
        ("a.txt", b"\xff\xfea", "cannot be read: 'utf-16"),
        ("a.json", b"\xef\xbb\xbf{", "cannot be read"),
        ("a.JSON", b"[]", 'has no "caption"'),
        ("a.json", b'{"caption": 3}', '"caption" in a.json is 3, not a text'),
        ("a.json", rb'{"caption": "\ud800"}', "no text; save it as UTF-8"),
    ],
)
def test_what_is_no_caption_is_named(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CaptionError) as error:
        read_caption(tmp_path / name)
    assert reason in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("captions", "read", "unused", "orphans"),
    [
        ("a.txt", "a.txt", {}, ""),
        ("a.TXT", "a.TXT", {}, ""),
        ("a.JSON", "a.JSON", {}, ""),
        ("a.png.txt", "a.png.txt", {}, ""),
        ("a.png.Json", "a.png.Json", {}, ""),
        ("a.json a.txt", "a.txt", {"a.json": "a.txt"}, ""),
        ("a.TXT a.txt", "a.txt", {"a.TXT": "a.txt"}, ""),
        ("a.TXT a.json", "a.TXT", {"a.json": "a.TXT"}, ""),
        ("a.png.json a.txt", "a.png.json", {"a.txt": "a.png.json"}, ""),
        ("A.txt a.jpg.txt a.png.bak.txt b.txt notes.json", None, {}, "A.txt a.jpg.txt a.png.bak.txt b.txt notes.json"),
    ],
)
def test_the_caption_file_of_a_medium(captions: str, read: str | None, unused: dict[str, str], orphans: str) -> None:
    names = [Path("deep", name) for name in captions.split()]
    assert all(map(is_caption, names))
    medium = Path("deep/a.png")
    matches = match([medium], names)
    assert matches.files == ({medium: Path("deep", read)} if read else {})
    assert {file.name: better.name for file, better in matches.unused.items()} == unused
    assert [file.name for file in matches.orphans] == orphans.split()


def test_media_of_one_name_share_what_is_not_only_one_s() -> None:
    media = [Path("a.gif"), Path("a.png"), Path("clip.1.mp4"), Path("bare"), Path("deep/a.png")]
    captions = [Path(name) for name in ("a.png.txt", "a.txt", "bare.txt", "clip.1.txt", "clip.txt")]
    matches = match(media, captions)
    assert {medium.name: file.name for medium, file in matches.files.items()} == {
        "a.gif": "a.txt",
        "a.png": "a.png.txt",
        "clip.1.mp4": "clip.1.txt",
        "bare": "bare.txt",
    }
    assert not matches.unused
    assert matches.orphans == [Path("clip.txt")]
