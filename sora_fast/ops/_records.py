"""Which kernels are proved: records of passes and failures, shipped with the package or made on this machine.

A record holds for one op, backend and dtype, on one kind of device, for one kernel source and one set of versions.
Those that `sora_fast.prove` makes lie one a file in the user's cache, so that processes that prove at the same time
cannot tear or lose each other's; validated.json, which the GPU suite writes, is a list of the same records.
"""

import ast
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sora_fast.ops import _library

VALIDATED = Path(__file__).with_name("validated.json")
# In place of a device class, where kernels are interpreted: no device is ever called so.
INTERPRETER = "interpreter"
# In place of a dtype, of an op that computes with integers only.
ANY_DTYPE = "any"
# What a pass rests on: the cases of sora_fast/proof/cases.py, or those and every test marked `gpu`. Either counts.
BY_CASES, BY_TESTS = "cases", "tests"


@dataclass(frozen=True)
class Machine:
    """What a record holds for, beside the kernel's source. device_class: sm_90 for an H100 or H200."""

    device_class: str
    driver: str
    torch: str
    triton: str
    package: str

    @staticmethod
    def of(device: torch.device) -> "Machine":
        """The one that `device` belongs to; on a CPU kernels can only be interpreted."""
        from sora_fast import __version__

        on_gpu = device.type == "cuda"
        kind, driver = (device_class(device), driver_version()) if on_gpu else (INTERPRETER, "none")
        return Machine(kind, driver, torch.__version__, package_version("triton") or "none", __version__)


@dataclass(frozen=True)
class Record:
    """That a kernel was right, or not, for all cases of an op and a dtype.

    source: hash of the kernel's files. cases: how many were tried. checked: `BY_CASES` or `BY_TESTS`. reason: what was
    wrong, with its numbers. device, date, note: where it comes from, for readers.
    """

    op: str
    backend: str
    dtype: str
    machine: Machine
    source: str
    passed: bool
    cases: int
    reason: str = ""
    device: str = ""
    date: str = ""
    note: str = ""
    checked: str = BY_CASES

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.backend, self.dtype

    @staticmethod
    def read(content: Any) -> "Record | None":
        """From JSON; None if that is no record, of another version for example."""
        try:
            return Record(**{**content, "machine": Machine(**content["machine"])})
        except (TypeError, KeyError):
            return None


def dtype_name(dtype: torch.dtype | None) -> str:
    """As records have it."""
    return ANY_DTYPE if dtype is None else str(dtype).removeprefix("torch.")


@cache
def device_class(device: torch.device) -> str:
    """The kind of GPU that `device` is: sm_90 for an H100 or H200."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def driver_version() -> str:
    """Of the NVIDIA driver, as nvidia-smi has it, or else of the CUDA that it brings."""
    with suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    with suppress(AttributeError, RuntimeError):
        return f"CUDA {torch._C._cuda_getDriverVersion()}"
    return "unknown"


def package_version(name: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def source_hash(op: str, backend: str = "triton") -> str:
    """Of the kernel files of `op` and of all that they import from kernels/; of "cuda" the compiled library's."""
    if backend == "cuda":
        library = _library.file("cuda")
        return hashlib.sha256(library.read_bytes()).hexdigest()[:16] if library.exists() else "none"
    spec = find_spec("sora_fast.kernels")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        return "none"
    folder = Path(next(iter(folders)))
    digest = hashlib.sha256()
    for name in sorted(_reached(folder, [op, f"{op}_backward"])):
        digest.update(name.encode() + b"\0" + (folder / f"{name}.py").read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _reached(folder: Path, names: Sequence[str]) -> set[str]:
    waiting, found = list(names), set()
    while waiting:
        file = folder / f"{waiting.pop()}.py"
        if file.stem not in found and file.exists():
            found.add(file.stem)
            waiting += _imports(file)
    return found


def _imports(file: Path) -> Iterator[str]:
    package = "sora_fast.kernels"
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            yield node.module.split(".")[2]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[2] for alias in node.names if alias.name.startswith(f"{package}."))


def cache_folder() -> Path | None:
    """Of this user: SORA_FAST_CACHE, else sora_fast in XDG_CACHE_HOME or ~/.cache; None without a home."""
    if own := os.environ.get("SORA_FAST_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sora_fast"
    except RuntimeError:
        return None


# What this process has found out itself: it counts where nothing can be written, too.
_own: dict[tuple[Machine, tuple[str, str, str]], Record] = {}


@cache
def find(op: str, backend: str, dtype: torch.dtype | None, device: torch.device) -> Record | None:
    """The record that holds here: of this process, of the user's cache, or shipped."""
    machine, key = Machine.of(device), (op, backend, dtype_name(dtype))
    record = _own.get((machine, key)) or _cached(machine, key)
    return record or _shipped().get((machine.device_class, machine.triton, source_hash(op, backend), key))


def _cached(machine: Machine, key: tuple[str, str, str]) -> Record | None:
    folder = cache_folder()
    if folder is None:
        return None
    try:
        record = Record.read(json.loads(_file(folder, machine, key).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    holds = record is not None and (record.machine, record.key, record.source) == (machine, key, source_hash(*key[:2]))
    return record if holds else None


def in_cache() -> list[Record]:
    """All records of the user's cache, those of other machines, versions and sources too."""
    folder = cache_folder()
    found = []
    for file in sorted((folder / "proved").glob("*.json")) if folder else ():
        with suppress(OSError, ValueError):
            found.append(Record.read(json.loads(file.read_text(encoding="utf-8"))))
    return [record for record in found if record is not None]


def _file(folder: Path, machine: Machine, key: tuple[str, str, str]) -> Path:
    what = json.dumps([asdict(machine), source_hash(*key[:2])])
    return folder / "proved" / f"{'-'.join(key)}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


@cache
def _shipped() -> dict[tuple[str, str, str, tuple[str, str, str]], Record]:
    """By what makes the machine code: the kind of device, the compiler, the source. Driver, torch and package may be
    others than where the suite ran: they do not change it."""
    return {(r.machine.device_class, r.machine.triton, r.source, r.key): r for r in read_list(VALIDATED) if r.passed}


def shipped_for(machine: Machine) -> int:
    """How many of the shipped records hold on a machine."""
    keys = _shipped().keys()
    return sum(
        (kind, triton) == (machine.device_class, machine.triton) and source == source_hash(*key[:2])
        for kind, triton, source, key in keys
    )


def read_list(file: Path) -> list[Record]:
    """The records of a file like validated.json; none if it is not there."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return [record for record in map(Record.read, content) if record is not None]


def written(records: Sequence[Record]) -> str:
    """What `read_list` reads, in an order of its own."""
    ordered = sorted(records, key=lambda record: (record.machine.device_class, *record.key))
    return json.dumps([asdict(record) for record in ordered], indent=1) + "\n"


def keep(records: Sequence[Record]) -> str:
    """Let them hold from now on, here and in the user's cache; why they could not be written, or nothing."""
    _own.update({(record.machine, record.key): record for record in records})
    forget()
    folder = cache_folder()
    if folder is None:
        return "there is no home folder"
    try:
        for record in records:
            _replace(_file(folder, record.machine, record.key), json.dumps(asdict(record), indent=1) + "\n")
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return ""


def _replace(file: Path, text: str) -> None:
    """At any moment the old or the new, whoever else writes the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as partial:
            partial.write(text)
        os.replace(name, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


_epoch = 0


def epoch() -> int:
    """A number that is another one whenever a record may be: for what is kept of `find`."""
    return _epoch


def forget() -> None:
    """Look again at what lies on the disk: another process may have proved something."""
    global _epoch
    find.cache_clear()
    _shipped.cache_clear()
    _epoch += 1  # last: what another thread keeps under the new number must not be of the old records
