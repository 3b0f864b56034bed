"""The Hopper kernels on a CPU: built with the C++ compiler against the emulator, called on torch tensors."""

import ctypes
import fcntl
import hashlib
import importlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from sora_fast.ops import _attention_cuda as compiled
from sora_fast.ops import _library
from sora_fast.proof.rule import poisoned_scratch
from sora_fast.schedule import TileSchedule

op_module = importlib.import_module("sora_fast.ops.packed_attention")

ROOT = Path(__file__).parent.parent.parent
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build" / "emulated"
FLAGS = (
    *("-std=c++20", f"-I{SOURCES}", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
)


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "token_stride", "head_stride")),
    )

    @classmethod
    def of(cls, x: Tensor) -> "_Tensor":
        if x.dim() == 1:  # not wanted
            return cls()
        assert x.stride(2) == 1
        return cls(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), x.stride(1))


class _Numbers(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("count", ctypes.c_int64))

    @classmethod
    def of(cls, x: Tensor) -> "_Numbers":
        assert x.dtype == torch.int32 and x.is_contiguous()
        return cls(x.data_ptr(), x.numel())


class _Walk(ctypes.Structure):
    _fields_ = (
        *((name, _Numbers) for name in ("own", "other", "begin", "split", "end", "order", "tiles")),
        ("num_tiles", ctypes.c_int),
        ("lists", ctypes.c_bool),
    )

    @classmethod
    def of(cls, own: Tensor, other: Tensor, side: Sequence[Tensor], lists: bool) -> "_Walk":
        return cls(*map(_Numbers.of, (own, other, *side)), len(side[3]), lists)


class _Boxes(ctypes.Structure):
    _fields_ = tuple((name, _Numbers) for name in ("low", "high", "place", "raster"))


class _Forward(ctypes.Structure):
    _fields_ = (
        *((name, _Tensor) for name in ("q", "k", "v", "out")),
        ("lse", ctypes.c_void_p),
        ("walk", _Walk),
        ("boxes", _Boxes),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("dim", "mask")),
        ("is_half", ctypes.c_bool),
    )


class _Backward(ctypes.Structure):
    _fields_ = (
        *((name, _Tensor) for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("lse", "grad_lse", "log2_lse", "delta")),
        ("by_query", _Walk),
        ("by_key", _Walk),
        ("boxes", _Boxes),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("dim", "mask")),
        ("is_half", ctypes.c_bool),
    )


class _Manner(ctypes.Structure):
    _fields_ = (("seed", ctypes.c_uint64), ("blocks", ctypes.c_int), ("check_races", ctypes.c_int))


class _Outcome(ctypes.Structure):
    _fields_ = (("trace", ctypes.c_uint64), ("steps", ctypes.c_int64), ("message", ctypes.c_char * 1000))


class EmulatedFault(RuntimeError):
    """What the emulator found wrong: a race, a deadlock, an access out of bounds."""


@dataclass(frozen=True)
class Gradients:
    """As `Emulated`."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    trace: int
    steps: int


@dataclass(frozen=True)
class Emulated:
    """What a kernel computed, and the hash of the interleaving in which it did."""

    out: Tensor
    lse: Tensor
    trace: int
    steps: int


def compile_object(source: Path, target: Path, *flags: str) -> None:
    """With the C++ compiler."""
    _compile([*FLAGS, *flags, "-c", str(source), "-o", str(target)])


def link(objects: list[Path], target: Path, *flags: str) -> None:
    """A shared library, in place only when it is whole."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    _compile(["-shared", *flags, *map(str, objects), "-o", str(partial)])
    partial.replace(target)


def _compile(arguments: list[str]) -> None:
    done = subprocess.run([compiler(), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:4000]


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not found:
        pytest.skip("no C++ compiler: the Hopper kernels cannot be emulated")
    return found


def emulator_objects() -> list[Path]:
    """Compiled once for all processes of a test run, and again when a source changes."""
    folder = _folder("emulator", [*sorted((SOURCES / "emulator").iterdir())])
    objects = []
    for source in sorted((SOURCES / "emulator").glob("*.cpp")):
        objects.append(folder / f"{source.stem}.o")
        if not objects[-1].exists():
            _once(folder, lambda source=source, target=objects[-1]: compile_object(source, target), objects[-1])
    return objects


@cache
def library() -> "Library":
    """The kernels as they are."""
    return Library(_built("kernels", sorted((SOURCES / "emulated").glob("attention_*.cpp"))))


def shared_library(name: str, sources: list[Path]) -> ctypes.CDLL:
    """C++ of the tests' own, with the headers of csrc/ and the emulator."""
    return ctypes.CDLL(str(_built(name, sources)))


def sanitized(name: str, sources: list[Path], *flags: str) -> Path:
    """A library under AddressSanitizer and UndefinedBehaviorSanitizer, which end the process at the first fault."""
    sanitizers = "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"
    emulator = sorted((SOURCES / "emulator").glob("*.cpp"))
    return _built(f"{name}-sanitized", [*sources, *emulator], *flags, "-O1", "-g", *sanitizers, linked=sanitizers)


def _built(name: str, sources: list[Path], *flags: str, linked: Sequence[str] | None = None) -> Path:
    """linked: what the linker is told where the emulator is among the sources; None: it is not."""
    parts = ("hopper", "emulator", "emulated")
    read = [path for part in parts for path in sorted((SOURCES / part).rglob("*")) if path.suffix in (".h", ".cpp")]
    folder = _folder(name, [*read, *sources], *flags)
    target = folder / f"lib{name}.so"

    def build() -> None:
        objects = [folder / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda source, output: compile_object(source, output, *flags), sources, objects))
        link([*objects, *(emulator_objects() if linked is None else [])], target, *(linked or ()))

    if not target.exists():
        _once(folder, build, target)
    return target


def _folder(name: str, sources: list[Path], *flags: str) -> Path:
    digest = hashlib.sha256(" ".join((compiler(), *FLAGS, *flags)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = BUILD / f"{name}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _once(folder: Path, build, target: Path) -> None:
    with open(folder / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            build()


class Library:
    """A build of the kernels: the real one, or a mutant. seed: of the interleaving; blocks: of the persistent grid."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, schedule: TileSchedule, *, scale: float | None = None, **manner: int
    ) -> Emulated:
        """q [N, H, D]; k, v [Nk, Hk, D], bf16 or fp16, columns side by side; lse [H, N]. Raises EmulatedFault."""
        scale = q.shape[2] ** -0.5 if scale is None else scale
        with self.native(**manner) as outcome, poisoned_scratch():
            out, lse = compiled.forward(q, k, v, *_packed(schedule), scale)
        return Emulated(out, lse, outcome.trace, outcome.steps)

    def gradients(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        schedule: TileSchedule,
        *,
        scale: float | None = None,
        keys: bool = True,
        **manner: int,
    ) -> Gradients:
        """grad_out, out: as q; grad_lse, lse [H, N] float32. Raises EmulatedFault."""
        scale = q.shape[2] ** -0.5 if scale is None else scale
        with self.native(**manner) as outcome, poisoned_scratch():
            inputs = grad_out, grad_lse, q, k, v, out, lse, *_packed(schedule), scale
            grads = compiled.backward(*inputs, keys=keys)
        return Gradients(*grads, *[None] * (3 - len(grads)), outcome.trace, outcome.steps)

    @contextmanager
    def native(self, *, seed: int = 0, blocks: int = 2, check_races: bool = True) -> Iterator[_Outcome]:
        """Inside, the package's calls of the CUDA library run these kernels, on CPU tensors."""
        manner, outcome = _Manner(seed, blocks, check_races), _Outcome()

        def function(name: str) -> Callable[..., None]:
            def call(*args: Any) -> None:
                arguments = _ARGUMENTS[name](*args)
                if getattr(self._library, f"emulated_{name}")(*map(ctypes.byref, (arguments, manner, outcome))):
                    raise EmulatedFault(outcome.message.decode())

            return call

        with patch.object(_library, "function", function):
            yield outcome


def _packed(schedule: TileSchedule) -> tuple[list[Tensor], int]:
    """As the op takes it: its tensors, and the kind of its mask."""
    return op_module._tensors(schedule), op_module._mask(op_module._kind(schedule))


# As csrc/cuda/attention.cu has the arguments of the ops, in their order.


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> _Forward:
    (own, other, *boxes), side, (lists, mask, scale, out, lse) = rest[:6], rest[6:11], rest[11:]
    walk = _Walk.of(own, other, side, lists)
    options = scale, q.shape[2], mask, q.dtype == torch.float16
    return _Forward(*map(_Tensor.of, (q, k, v, out)), lse.data_ptr(), walk, _Boxes(*map(_Numbers.of, boxes)), *options)


def _backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> _Backward:
    (own, other, *boxes), by_query, by_key, (lists, mask, scale, *outputs) = (
        rest[:6],
        rest[6:11],
        rest[11:16],
        rest[16:],
    )
    grads, statistics = outputs[:3], outputs[3:]
    return _Backward(
        *map(_Tensor.of, (q, k, v, out, grad_out, *grads)),
        *(x.data_ptr() or None for x in (lse, grad_lse, *statistics)),
        _Walk.of(own, other, by_query, lists),
        _Walk.of(other, own, by_key, lists),
        _Boxes(*map(_Numbers.of, boxes)),
        *(scale, q.shape[2], mask, q.dtype == torch.float16),
    )


_ARGUMENTS = {"attention_forward": _forward, "attention_backward": _backward}
