import os
import shutil
from pathlib import Path

import pytest

from sora_fast.training.data.walk import each_once, walk


def _tree(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def _names(root: Path, paths: list[Path]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_plain_folders_are_listed_as_ever(tmp_path: Path) -> None:
    """In the order of before, on which the samples' numbers and the fingerprints of old runs depend."""
    _tree(tmp_path, "b/x.mp4", "a.png", "b.png", "B/y.gif", "b/deep/z", ".hidden.png", ".git/config", "b/.x/y.png")
    expected = [
        path
        for path in sorted(tmp_path.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(tmp_path).parts)
    ]
    found = walk(tmp_path)
    assert found.files == expected
    assert len(found.files) == 5
    assert not found.skipped


@pytest.mark.parametrize(
    ("links", "files", "skipped"),
    [
        ({"in/far": "out"}, ["in/a.png", "in/far/b.png", "in/far/deep/c.png"], {}),
        ({"in/near": "in/sub", "in/sub/d.png": "out/b.png"}, ["in/a.png", "in/sub/d.png"], {"in/near": "read already"}),
        ({"in/loop": "in"}, ["in/a.png"], {"in/loop": "read already"}),
        (
            {"in/far": "out", "out/back": "in"},
            ["in/a.png", "in/far/b.png", "in/far/deep/c.png"],
            {"in/far/back": "read"},
        ),
        ({"in/1": "out", "in/2": "out"}, ["in/1/b.png", "in/1/deep/c.png", "in/a.png"], {"in/2": "read already"}),
        ({"in/1": "out/deep", "in/2": "out"}, ["in/1/c.png", "in/2/b.png", "in/a.png"], {}),
        ({"in/lost.png": "gone.png"}, ["in/a.png"], {"in/lost.png": "gone.png, which is not there"}),
        ({"in/lost": "gone"}, ["in/a.png"], {"in/lost": "gone, which is not there"}),
        ({"in/self": "in/self"}, ["in/a.png"], {"in/self": "Too many levels of symbolic links"}),
        ({"in/.hidden": "out"}, ["in/a.png"], {}),
    ],
)
def test_links_are_followed_or_named(
    links: dict[str, str], files: list[str], skipped: dict[str, str], tmp_path: Path
) -> None:
    _tree(tmp_path, "in/a.png", "out/b.png", "out/deep/c.png")
    for name, target in links.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / target)
    found = walk(tmp_path / "in")
    assert _names(tmp_path, found.files) == files
    assert _names(tmp_path, sorted(found.skipped)) == list(skipped)
    for name, reason in skipped.items():
        assert reason in found.skipped[tmp_path / name]


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tree(tmp_path, "a.png", "closed/b.png", "open/c.png")
    os.mkfifo(tmp_path / "pipe")
    scandir = os.scandir  # the permission bits of files do not bind root, who may be running this

    def guarded(folder: Path) -> object:
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    found = walk(tmp_path)
    assert _names(tmp_path, found.files) == ["a.png", "open/c.png"]
    assert found.skipped == {
        tmp_path / "closed": "cannot be read: Permission denied",
        tmp_path / "pipe": "neither a file nor a folder",
    }


def test_each_real_file_once(tmp_path: Path) -> None:
    _tree(tmp_path, "in/m.png", "out/n.png")
    for name, target in {"a.png": "in/m.png", "o.png": "out/n.png", "p.png": "out/n.png"}.items():
        (tmp_path / "in" / name).symlink_to(tmp_path / target)
    shutil.copy(tmp_path / "in" / "m.png", tmp_path / "in" / "copy.png")
    kept, doubles = each_once(walk(tmp_path / "in").files)
    assert _names(tmp_path, kept) == ["in/copy.png", "in/m.png", "in/o.png"]
    assert {path.name: reason for path, reason in doubles.items()} == {
        "a.png": f"a link to {tmp_path}/in/m.png, which is read already",
        "p.png": f"a link to {tmp_path}/in/o.png, which is read already",
    }
