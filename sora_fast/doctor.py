"""What runs here, and why: versions, devices, the backend of every op, what is proved."""

import os
import platform
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

import sora_fast
from sora_fast.ops import _attention_cpu, _attention_cuda, _library, _records
from sora_fast.ops._checks import KERNEL_DTYPES
from sora_fast.ops._dispatch import PROVE, UNPROVED, default
from sora_fast.ops._records import Machine, Record, dtype_name
from sora_fast.proof.cases import OPS

# What brings more to the package where it is installed: distribution → for what.
OPTIONAL: Mapping[str, str] = {
    "av": "videos",
    "pillow": "images",
    "transformers": "CLIP and T5",
    "flash-attn": "attention, if asked for",
    "xformers": "attention, if asked for",
    "matplotlib": "reports, the demo",
    "scikit-learn": "the demo",
    "nvidia-ml-py": "clocks and power in benchmarks",
}
_VARIABLES = ("SORA_FAST_BACKEND", "SORA_FAST_PROVE", "SORA_FAST_CACHE", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Device:
    """One that tensors may lie on. kind: its device class; None of a CPU."""

    name: str
    model: str
    kind: str | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Choice:
    """What an op runs on by default for a dtype, and why not on what would come before."""

    op: str
    dtype: str
    backend: str
    refused: dict[str, str]


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found. device: that the choices are for. records: of this user's cache; `here` tells those that
    hold for `machine` and the kernels as they are. shipped: how many hold of validated.json."""

    versions: dict[str, str | None]
    libraries: list[str]
    packages: dict[str, str | None]
    environment: dict[str, str]
    devices: list[Device]
    device: str
    machine: Machine
    choices: list[Choice]
    cache: str | None
    records: list[Record]
    shipped: int

    def here(self, record: Record) -> bool:
        """Whether a record holds for this machine and source."""
        return record.machine == self.machine and record.source == _records.source_hash(record.op, record.backend)

    def json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        records = [asdict(record) | {"holds_here": self.here(record)} for record in self.records]
        return asdict(self) | {"records": records}

    def __str__(self) -> str:
        parts = (self._installed(), self._devices(), self._choices(), self._proved())
        return "\n\n".join("\n".join(part) for part in parts)

    def _installed(self) -> Iterator[str]:
        yield f"sora_fast {self.versions['sora_fast']}"
        for name in ("python", "torch", "cuda", "driver", "triton"):
            yield f"  {name:12} {self.versions[name] or 'none'}"
        for line in self.libraries:
            yield from textwrap.wrap(f"  {'compiled':12} {line}", 120, subsequent_indent=" " * 15)
        for name, version in self.packages.items():
            yield f"  {name:12} {version or 'not installed'} ({OPTIONAL[name]})"
        for name, value in self.environment.items():
            yield f"  {name}={value}"

    def _devices(self) -> Iterator[str]:
        yield "Devices"
        for device in self.devices:
            memory = "" if device.memory_bytes is None else f", {device.memory_bytes / 2**30:.0f} GiB"
            yield f"  {device.name:12} {device.model}{memory}{f', {device.kind}' if device.kind else ''}"

    def _choices(self) -> Iterator[str]:
        yield f"By default on {self.device}"
        width = max(len(choice.op) for choice in self.choices)
        yield f"  {'':{width}}  " + "".join(f"{_SHORT[dtype_name(dtype)]:8}" for dtype in _DTYPES).rstrip()
        for op in dict.fromkeys(choice.op for choice in self.choices):
            backends = [choice.backend for choice in self.choices if choice.op == op]
            yield f"  {op:{width}}  " + "".join(f"{backend:8}" for backend in backends).rstrip()
        for backend, called in {"cuda": "CUDA C++", "triton": "Triton"}.items():
            for reason, names in self._reasons(backend).items():
                yield f"  not {called}, {', '.join(names)}: {reason}"

    def _reasons(self, backend: str) -> dict[str, list[str]]:
        """Why not on `backend`, each reason once: of which ops, and of which dtypes if not of all."""
        reasons: dict[str, dict[str, list[str]]] = {}
        for choice in self.choices:
            if reason := choice.refused.get(backend):
                reasons.setdefault(reason, {}).setdefault(choice.op, []).append(_SHORT.get(choice.dtype, choice.dtype))
        named = {reason: [_named(op, dtypes) for op, dtypes in ops.items()] for reason, ops in reasons.items()}
        few = {reason: names for reason, names in named.items() if len(names) <= 4}
        return few | {reason: ["the others"] for reason in named if reason not in few}

    def _proved(self) -> Iterator[str]:
        yield f"Proved kernels, recorded in {self.cache or 'no folder: there is no home'}"
        here = [record for record in self.records if self.here(record)]
        yield f"  {self.shipped} shipped records hold here"
        right = "right" if self.machine.device_class != _records.INTERPRETER else "right, interpreted"
        for line in _summed(record for record in here if record.passed) or ["nothing yet"]:
            yield f"  {right}: {line}"
        for record in here:
            if not record.passed:
                yield f"  WRONG: {record.op} {record.dtype}, {record.date}: {record.reason}"
        if others := len(self.records) - len(here):
            yield f"  {others} of other devices, versions or sources"
        if any(choice.refused.get("triton", "").startswith(UNPROVED) for choice in self.choices):
            yield f"  To prove the others: {PROVE}"
        if self.machine.device_class == _records.INTERPRETER:
            yield f"  Without a GPU, `{PROVE}` interprets the kernels, which counts for no GPU."


def _named(op: str, dtypes: list[str]) -> str:
    return op if len(dtypes) == len(_DTYPES) else f"{op} {' '.join(dtypes)}"


def _summed(records: Iterator[Record]) -> list[str]:
    """A line an op."""
    dtypes: dict[str, list[str]] = {}
    for record in records:
        dtypes.setdefault(record.op, []).append(_SHORT.get(record.dtype, record.dtype))
    return [" ".join([op, *sorted({*names} - {_records.ANY_DTYPE})]) for op, names in dtypes.items()]


def examine(device: torch.device | str | None = None) -> Diagnosis:
    """Look at this machine; starts nothing. device: that the choices are for; None: the first GPU if there is one."""
    if device is None:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    _records.forget()
    folder = _records.cache_folder()
    machine = Machine.of(device)
    return Diagnosis(
        versions=_versions(),
        libraries=_library.said(),
        packages={name: _records.package_version(name) for name in OPTIONAL},
        environment={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        devices=list(_found_devices()),
        device=str(device),
        machine=machine,
        choices=list(_chosen(device)),
        cache=None if folder is None else str(folder),
        records=_records.in_cache(),
        shipped=_records.shipped_for(machine),
    )


def _versions() -> dict[str, str | None]:
    return {
        "sora_fast": sora_fast.__version__,
        "python": f"{platform.python_version()} on {sys.platform}, {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _records.driver_version() if torch.cuda.is_available() else None,
        "triton": _records.package_version("triton"),
    }


def _found_devices() -> Iterator[Device]:
    yield Device("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kind = _records.device_class(torch.device("cuda", index))
        yield Device(f"cuda:{index}", properties.name, kind, properties.total_memory)


def _attention_here(device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """The compiled backend of attention for such a device, and why it does not take the full mask there."""
    if device.type == "cuda":
        return "cuda", _attention_cuda.refusal_here(device, dtype)
    return "cpu", _attention_cpu.refusal(dtype, whole=True)


def _chosen(device: torch.device) -> Iterator[Choice]:
    for op in (*OPS, "segment_mean"):
        for dtype in _DTYPES:
            offered = ("torch", "triton") if op in OPS and dtype in KERNEL_DTYPES else ("torch",)
            offered += ("cpu", "cuda") if op in _library.OPS else ()
            unsuited: tuple[tuple[str, str], ...] = ()
            if op == "packed_attention":
                name, reason = _attention_here(device, dtype)
                offered += (name,)
                unsuited = ((name, reason),) if reason else ()
            backend, refused = default(op, device, offered, None if op == "schedule" else dtype, unsuited)
            # Not what an op never has, nor that a CPU is no GPU.
            told = ("triton", "cuda") if "cuda" in offered and device.type != "cpu" else ("triton",)
            yield Choice(op, dtype_name(dtype), backend, {name: refused[name] for name in told if name in refused})
