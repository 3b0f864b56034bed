import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sora_fast import files


def test_write_text_replaces(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for text in ("eins\n", "zwölf\n", ""):
        files.write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert list(tmp_path.iterdir()) == [path]


def test_a_crash_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    files.write_text(path, "old")

    def crash(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "flush", crash)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    files.write_text(path, "newer")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert path.read_text() == "newer"


def test_what_utf8_cannot_hold_is_escaped(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.json", os.fsdecode(b'"caf\xe9, \xc3\xa9"'))
    assert (tmp_path / "a.json").read_bytes() == b'"caf\\udce9, \xc3\xa9"'


def test_a_link_stays_one_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").touch(mode=0o640)
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["a" * 255, "\u8239" * 85, os.fsdecode(b"\xe9" * 255)])
def test_the_longest_names_are_written(tmp_path: Path, name: str) -> None:
    files.write_text(tmp_path / name, "new")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.safetensors", os.fsdecode(b"\xe9.safetensors")])
def test_tensors_are_read_under_any_name(tmp_path: Path, name: str) -> None:
    tensors = {"weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}
    save_file(tensors, tmp_path / name)
    assert torch.equal(files.read_tensors(tmp_path / name)["weight"], tensors["weight"])


def test_a_folder_that_takes_files_is_left_as_it_was(tmp_path: Path) -> None:
    files.check_folder(tmp_path)
    files.check_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    with files.trial_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("/proc/new", "/proc: No such file or directory"),
        ("file", "file: Not a directory"),
        ("file/new", "file: Not a directory"),
        ("new/" + "a" * 256, "File name too long"),
    ],
)
def test_a_folder_that_takes_none_is_named(tmp_path: Path, folder: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"nothing can be written to .*{reason}"):
        files.check_folder(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
