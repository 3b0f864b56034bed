"""Compiled kernels that travel: made by the rehearsal on any machine, and found by Triton on the GPU suite's.

Triton looks a kernel up by a hash of its own files and the compiler's, of the kernel's source (not of where it lies),
of what it is specialised for, and of the target: a kernel that is another there is not found, and compiled. What keeps
it from finding the others in another folder is that its cache names files by absolute paths; so they travel without.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

_KEY = "key.json"
# What a launch reads of a kernel; the stages before the binary are five times as large.
_NEEDED = (".json", ".cubin")


def pack(cache: Path, folder: Path, *, target: str) -> int:
    """Copy the kernels of a Triton cache for `target` ("sm_90") into `folder`; how many there are in it now."""
    for group, names in _groups(cache):
        if _target(group) == target:
            _copy(group, folder, {name: name for name in names if name.endswith(_NEEDED)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _KEY).write_text(json.dumps(_key() | {"target": target}), encoding="utf-8")
    return len(list(_groups(folder)))


def why_not(folder: Path, *, target: str) -> str | None:
    """Why the kernels in `folder` are of no use to this Triton, or on `target`; None if they are."""
    try:
        theirs = json.loads((folder / _KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"no compiled kernels in {folder}: {error}"
    ours = _key() | {"target": target}
    differ = [f"{name} {theirs.get(name)}, here {ours[name]}" for name in ours if theirs.get(name) != ours[name]]
    return f"{folder} was made by or for another: {'; '.join(differ)}" if differ else None


def unpack(folder: Path, cache: Path) -> int:
    """Put what was packed into `folder` where Triton looks for it, with TRITON_CACHE_DIR=cache; how many kernels."""
    for group, names in _groups(folder):
        _copy(group, cache, {name: str(cache.resolve() / group.parent.name / name) for name in names})
    return len(list(_groups(folder)))


def _groups(cache: Path) -> Iterator[tuple[Path, list[str]]]:
    """Of every kernel the file that lists its others, and the names of those."""
    for group in sorted(cache.glob("*/__grp__*.json")):
        yield group, list(json.loads(group.read_text(encoding="utf-8"))["child_paths"])


def _target(group: Path) -> str:
    metadata = json.loads((group.parent / group.name.removeprefix("__grp__")).read_text(encoding="utf-8"))
    return f"sm_{metadata['target']['arch']}"


def _copy(group: Path, to: Path, paths: Mapping[str, str]) -> None:
    """A kernel's files, `paths` by name, with a list that says `paths`."""
    folder = to / group.parent.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in paths:
        shutil.copyfile(group.parent / name, folder / name)
    (folder / group.name).write_text(json.dumps({"child_paths": paths}), encoding="utf-8")


def _key() -> dict[str, str]:
    """What Triton's own keys begin with, and what tells a reader why they differ."""
    import triton
    from triton.runtime.cache import triton_key

    files = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    version = ".".join(platform.python_version_tuple()[:2])
    return {"Triton": triton.__version__, "Python": version, "Triton's files": files}
