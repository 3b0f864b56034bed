"""Files that a failure cannot spoil, and folders that are known to take files before the work is done."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_KEPT_OF_A_NAME = 50  # characters, of four bytes at most: a name of 255 bytes, the longest, has no room for a prefix


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Gives a hidden name in the folder of `path`, to write to; what is written there is gone when the block ends."""
    partial = path.with_name(f".partial-{path.name[-_KEPT_OF_A_NAME:]}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """As `beside`, but what is written takes the place of `path` when the block ends well.

    Whatever goes wrong, `path` is as it was. A link remains one, and permissions remain.
    """
    target = Path(os.path.realpath(path))
    with beside(target) as partial:
        yield partial
        if target.exists():
            shutil.copymode(target, partial)
        partial.replace(target)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content: at any moment, it is the old or the new one.

    In UTF-8; bytes of file names that are none are escaped, the way of JSON and Python.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        flush(partial)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """A file of safetensors, mapped into memory, unless bytes of its name are no UTF-8, which safetensors refuses."""
    from safetensors.torch import load, load_file

    return load_file(path) if is_text(path) else load(path.read_bytes())


def is_text(path: Path) -> bool:
    """Whether a path is UTF-8, as libraries expect that are not written in Python."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def trial_folder(folder: Path) -> Iterator[None]:
    """Within the block, `folder` is there; what had to be made for that is gone afterwards.

    Raises ValueError if it cannot be made, or takes no file.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    present = missing[-1].parent if missing else folder
    try:
        try:
            if missing:
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(4096))
        except OSError as error:
            raise ValueError(f"nothing can be written to {present}: {error.strerror}") from error
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def check_folder(folder: Path) -> None:
    """ValueError if no file can be written to `folder`, which need not be there yet; leaves nothing behind."""
    with trial_folder(folder):
        pass
