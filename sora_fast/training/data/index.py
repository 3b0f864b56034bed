"""What was found out about the files of a folder, kept in the user's cache, so that it need not be found out again."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sora_fast import files
from sora_fast.media import Probe, Timeline, UnreadableMedia, probe
from sora_fast.ops._records import cache_folder

log = logging.getLogger(__name__)

# Of what is kept of a file; another number lets all be found out anew.
FORMAT = 1
# Files that are opened at once: decoding a first frame takes a core, waiting for a disk takes none.
THREADS = 2 * (os.cpu_count() or 1)

Found = Probe | str


def probed(
    folder: Path, paths: Sequence[Path], *, tell: Callable[[Iterable[Found]], Iterable[Found]] = iter
) -> list[Found]:
    """A Probe of each file, or why it cannot be used: from the index if the file is as it was then, else anew.

    A file is as it was if its size and the time of its last change are. Why one cannot be used is not kept: what was
    missing may be there the next time. tell: wraps what is found as it comes.
    """
    place = _place(folder)
    known = _read(place)
    stamps = [_stamp(path) for path in paths]
    names = [os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace") for path in paths]

    def found(number: int) -> Found:
        entry = known.get(names[number])
        if entry is not None and entry["stamp"] == stamps[number]:
            return _unpacked(entry["probe"])
        return _probed(paths[number])

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(tell(pool.map(found, range(len(paths)))))
    found_now = zip(names, stamps, results, strict=True)
    entries = {n: {"stamp": s, "probe": asdict(r)} for n, s, r in found_now if isinstance(r, Probe)}
    if place is not None and any(known.get(name, {}).get("stamp") != entry["stamp"] for name, entry in entries.items()):
        _write(place, _read(place) | entries)  # others that train together may have written their share
    return results


def _probed(path: Path) -> Found:
    try:
        return probe(path)
    except UnreadableMedia as error:
        return error.reason
    except OSError as error:
        return str(error)


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


def _unpacked(values: dict[str, Any]) -> Probe:
    starts = values["timeline"]["starts"]
    return Probe(**values | {"timeline": Timeline(**values["timeline"] | {"starts": starts and tuple(starts)})})


def _place(folder: Path) -> Path | None:
    cache = cache_folder()
    if cache is None:
        return None
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return cache / "folders" / f"{name}.json"


def _read(place: Path | None) -> dict[str, Any]:
    try:
        content = json.loads(place.read_text(encoding="utf-8")) if place is not None else {}
        return content["files"] if content.get("format") == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(place: Path, entries: dict[str, Any]) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(place, json.dumps({"format": FORMAT, "files": entries}))
    except OSError as error:
        log.warning("what was found out about the files cannot be kept, and takes as long the next time: %s", error)
