"""Triton without a GPU: its real JIT, compiler and launcher over a libcuda that runs nothing and notes each launch.

Everything that the host does for a kernel happens: arguments are bound and specialised, cubins compiled and loaded,
parameters packed. So host time can be measured on any machine, and a test can see which compiled kernel a call launches
and what it would be given. Tensors stay on the CPU, so what a GPU's allocator, `cudaGetDevice` and the driver's own
work in a launch take is missing from the times. Results are whatever the memory held.

For a process of its own: `activate` is for good.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

_SOURCE = Path(__file__).with_name("driver.c")
# As driver.c has them.
_MOST_KERNELS, _MOST_NAME, _MOST_LAUNCHES, _MOST_PARAMS, _MOST_BYTES = 4096, 256, 64, 128, 4096


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * _MOST_NAME),
        ("num_params", ctypes.c_int),
        ("offsets", ctypes.c_uint16 * _MOST_PARAMS),
        ("sizes", ctypes.c_uint16 * _MOST_PARAMS),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_int),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("num_bytes", ctypes.c_int),
        ("bytes", ctypes.c_ubyte * _MOST_BYTES),
    )


@dataclass(frozen=True)
class Launch:
    """What the driver was asked to run. kernel: the number of the loaded module, which tells the compiled forms of one
    kernel apart; params: the bytes of each parameter, Triton's two of scratch memory last."""

    name: str
    kernel: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int
    params: tuple[bytes, ...]

    def integers(self) -> tuple[int, ...]:
        """The parameters as signed integers: pointers, sizes, strides."""
        return tuple(int.from_bytes(param, "little", signed=True) for param in self.params)


class StubDriver:
    """The driver of this process. device, stream: the current ones, to be set by tests."""

    def __init__(self, arch: tuple[int, int]) -> None:
        self.arch, self.device, self.stream = arch, 0, 0
        self._folder = tempfile.TemporaryDirectory(prefix="stub_driver-")  # gone with the process
        self._library = ctypes.CDLL(str(_built(Path(self.folder))), mode=ctypes.RTLD_GLOBAL)

    @property
    def folder(self) -> str:
        """Where its libcuda.so.1 lies."""
        return self._folder.name

    @property
    def num_launches(self) -> int:
        """Launches so far."""
        return ctypes.c_longlong.in_dll(self._library, "stub_num_launches").value

    def launches(self, since: int = 0) -> list[Launch]:
        """Those after the first `since`; the last 64 of all are known. ValueError for more."""
        total = self.num_launches
        if total - since > _MOST_LAUNCHES:
            raise ValueError(f"since: {since} of {total} launches; only the last {_MOST_LAUNCHES} are known")
        return [self._read(number) for number in range(since, total)]

    def _read(self, number: int) -> Launch:
        launch = self._launches[number % _MOST_LAUNCHES]
        kernel = self._kernels[launch.kernel]
        content = bytes(launch.bytes[: launch.num_bytes])
        places = list(zip(kernel.offsets, kernel.sizes, strict=True))[: kernel.num_params]
        params = (content[first : first + size] for first, size in places)
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        grid = (launch.grid[0], launch.grid[1], launch.grid[2])
        name = kernel.name.decode()
        return Launch(name, launch.kernel, grid, threads, launch.shared, launch.stream, tuple(params))

    @cached_property
    def _launches(self) -> Sequence[_Launch]:
        return (_Launch * _MOST_LAUNCHES).in_dll(self._library, "stub_launches")

    @cached_property
    def _kernels(self) -> Sequence[_Kernel]:
        return (_Kernel * _MOST_KERNELS).in_dll(self._library, "stub_kernels")


def why_not() -> str | None:
    """Why it cannot work on this machine; None if it can."""
    if not sys.platform.startswith("linux"):
        return "the stub driver is for Linux, as Triton is"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if _compiler() is None:
        return "no C compiler: neither CC is set nor is gcc or clang found"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's headers are not installed, which Triton's launcher is compiled with"
    return None


def activate(arch: tuple[int, int] = (9, 0)) -> StubDriver:
    """Let this process launch its kernels on a GPU that is not there, for good. arch: its compute capability.

    Before the first kernel is imported: without TRITON_INTERPRET, which makes another kind of them. Raises RuntimeError
    where it cannot work.
    """
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if reason := why_not() or ("TRITON_INTERPRET is set" if interpreted else None):
        raise RuntimeError(f"no stub driver: {reason}")
    stub = StubDriver(arch)
    # Triton links its launchers against what lies there, and opens it by its name once it is loaded.
    os.environ["TRITON_LIBCUDA_PATH"] = stub.folder

    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    active = CudaDriver()
    active.get_device_capability = lambda device=None: stub.arch
    active.get_current_device = lambda: stub.device
    active.get_current_stream = lambda device=None: stub.stream
    active.set_current_device = lambda device: setattr(stub, "device", device)
    driver.set_active(active)

    from sora_fast.ops import _dispatch
    from sora_fast.packing import _bundle

    # Tensors on a CPU stand for a GPU's: they may go to Triton's kernels, and nobody may read them for nothing. (By its
    # code: the function is in many modules by now.)
    _dispatch.interpreting = lambda: True
    _bundle.may_read.__code__ = (lambda tensor: False).__code__
    return stub


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _built(folder: Path) -> Path:
    library = folder / "libcuda.so.1"
    options = ("-shared", "-fPIC", "-O2", "-fvisibility=hidden", f"-Wl,-soname,{library.name}")
    subprocess.run([_compiler(), *options, "-o", str(library), str(_SOURCE)], check=True)
    return library
