"""Checkpoints that a crash cannot spoil: safetensors and JSON in a directory that appears whole or never.

    ROOT/step-00001200/model.safetensors, optimizer.safetensors, …, state.json

A checkpoint is written under a hidden name, flushed to the disk, then renamed. Whatever kills the process,
what bears a `step-` name is complete. Nothing is ever unpickled.
"""

import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sora_fast import files

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)")
_PARTIAL = ".partial-"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint in memory, on the CPU: groups of named tensors, and a JSON-able state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 3,
) -> Path:
    """Write checkpoint `step` under `root`, atomically, and delete all but it and the `keep` - 1 before it.

    Those of later steps go too: they are what a run passed over, being damaged, when it went on from an older one.

    tensors: per file name (without suffix), the named tensors in it, on any device. state: what JSON takes.
    Returns the checkpoint's directory. OSError or SafetensorError if it cannot be written, as on a full disk: what was
    there before is whole then.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    root.mkdir(parents=True, exist_ok=True)
    _remove_partial(root)
    partial, final = root / f"{_PARTIAL}{step}", root / f"step-{step:08d}"
    try:
        _write(partial, {"step": step, "groups": list(tensors), "state": state}, tensors)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk, room for what comes next
        raise
    if final.exists():
        _discard(final)
    partial.rename(final)
    files.flush(root)
    kept = [path for number, path in _found(root) if number <= step][:keep]
    for _, path in _found(root):
        if path not in kept:
            _discard(path)
    return final


def _write(directory: Path, record: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    directory.mkdir()
    for group, named in tensors.items():
        file = directory / f"{group}.safetensors"
        save_file({name: t.detach().cpu().contiguous() for name, t in named.items()}, file)
        files.flush(file)
    (directory / "state.json").write_text(json.dumps(record))
    files.flush(directory / "state.json")
    files.flush(directory)


def load(directory: Path, groups: Collection[str] | None = None) -> Checkpoint:
    """Read one checkpoint directory, all its groups or only some.

    Raises OSError, ValueError or SafetensorError if it is damaged.
    """
    record = json.loads((directory / "state.json").read_text())
    wanted = [group for group in record["groups"] if groups is None or group in groups]
    tensors = {group: files.read_tensors(directory / f"{group}.safetensors") for group in wanted}
    return Checkpoint(record["step"], tensors, record["state"])


def latest(root: Path, groups: Collection[str] | None = None) -> Checkpoint | None:
    """The newest readable checkpoint under `root`; a damaged one is passed over, with a warning.

    None if there is none at all. ValueError if there are some and all of them are damaged: that is no fresh start.
    """
    damaged = []
    for _, directory in _found(root):
        try:
            return load(directory, groups)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("passing over the damaged checkpoint %s: %s", directory, error)
            damaged.append(f"{directory.name}: {error}")
    if damaged:
        raise ValueError(f"{root} holds no checkpoint that can be read ({'; '.join(damaged)})")
    return None


def _found(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint, newest first."""
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _discard(directory: Path) -> None:
    # Renamed first: a deletion cut short must not leave half of it under a name that promises all.
    doomed = directory.with_name(f"{_PARTIAL}old-{directory.name}")
    directory.rename(doomed)
    shutil.rmtree(doomed)


def _remove_partial(root: Path) -> None:
    for leftover in root.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover)
