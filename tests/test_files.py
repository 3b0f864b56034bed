from pathlib import Path

import pytest

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
