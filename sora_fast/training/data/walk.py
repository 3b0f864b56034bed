"""The files below a folder, behind links too, in an order that does not depend on the file system."""

import heapq
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Found:
    """files: sorted. skipped: what is there and cannot be used, with the reason."""

    files: list[Path] = field(default_factory=list)
    skipped: dict[Path, str] = field(default_factory=dict)


def walk(folder: Path) -> Found:
    """Every file below a folder but the hidden ones. Each real folder is entered once, by links only if need be."""
    found, entered = Found(), set()
    pending = [(False, folder)]  # links last: what a folder holds itself keeps its own name
    while pending:
        is_link, here = heapq.heappop(pending)
        real = os.path.realpath(here)
        if real in entered:
            if is_link:
                found.skipped[here] = f"a link to {real}, which is read already"
            continue
        entered.add(real)
        for entry, mode in _entries(here, found.skipped):
            if stat.S_ISDIR(mode):
                heapq.heappush(pending, (entry.is_symlink(), here / entry.name))
            elif stat.S_ISREG(mode):
                found.files.append(here / entry.name)
            else:
                found.skipped[here / entry.name] = "neither a file nor a folder"
    found.files.sort()
    return found


def _entries(folder: Path, skipped: dict[Path, str]) -> list[tuple[os.DirEntry, int]]:
    """What is in a folder, with the mode of what links lead to."""
    entries = []
    try:
        with os.scandir(folder) as listing:
            listed = [entry for entry in listing if not entry.name.startswith(".")]
    except OSError as error:
        skipped[folder] = f"cannot be read: {error.strerror}"
        return []
    for entry in listed:
        try:
            entries.append((entry, entry.stat().st_mode))
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            if entry.is_symlink() and isinstance(error, FileNotFoundError):
                reason = f"a link to {os.readlink(entry)}, which is not there"
            skipped[folder / entry.name] = reason
    return entries


def each_once(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """The same without links to files that are there already, and those links with the reason."""
    kept, doubles = {}, {}
    for path in sorted(paths, key=lambda path: (path.is_symlink(), path)):
        other = kept.setdefault(os.path.realpath(path), path)
        if other is not path:
            doubles[path] = f"a link to {other}, which is read already"
    return sorted(kept.values()), doubles
