"""Files that a crash cannot spoil: they appear whole, under another name first."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace a file's content: at any moment, it is the old or the new one."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
