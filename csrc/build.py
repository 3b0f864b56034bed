"""How the compiled libraries are built: from which files, by which compiler, and when they are left out.

setup.py builds those that a package has; tests build `EMULATED` with `build`. Nothing of torch is imported, only its
headers are read. A file is compiled anew if it, a header of ours that it includes, or its command has changed.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# LibTorch's stable ABI of 2.10: what is built against it runs with every later torch.
TORCH_TARGET = "TORCH_TARGET_VERSION=0x020a000000000000"
# Ampere and Hopper; from the PTX a driver compiles for chips that are newer.
CUDA_ARCHITECTURES = "8.0+PTX;9.0a"
_ARCHITECTURE = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")
_MIN_NVCC = (12, 0)  # the first that knows sm_90a


class Unavailable(Exception):
    """Why a library cannot be built here. It is left out, unless the user demands it."""


@dataclass(frozen=True)
class Library:
    """sources: patterns in csrc/. cost: what is not there without it. flags: of its compiler, beside those of all.
    hopper: patterns of what is written for sm_90a alone, and left out where that is not among the architectures."""

    name: str
    sources: tuple[str, ...]
    cost: str
    cuda: bool = False
    flags: tuple[str, ...] = ()
    hopper: tuple[str, ...] = ()

    @property
    def files(self) -> list[Path]:
        """The sources, in order."""
        return sorted(file for pattern in self.sources for file in ROOT.glob(pattern))


# Sums of products are rounded once, as a processor does that has such an instruction; no warning about how vectors are
# passed, since all that take them are inlined.
_CPU_FLAGS = ("-ffp-contract=fast", "-Wno-psabi")
CPU = Library(
    "_cpu",
    ("cpu/*.cpp",),
    "on a CPU patches are moved in plain PyTorch, at a third of the speed, and attention takes a call a segment",
    flags=_CPU_FLAGS,
)
CUDA = Library(
    "_cuda",
    ("cuda/*.cu",),
    "there are no kernels in CUDA C++, while Triton's are there",
    cuda=True,
    hopper=("cuda/attention*.cu",),
)
# The CUDA kernels of patches on a host: for tests alone, never installed.
EMULATED = Library("_emulated", ("emulated/patches.cpp",), "they are not tested")
INSTALLED = (CPU, CUDA)


@dataclass(frozen=True)
class Toolchain:
    """What compiles a library here. name: for users. link: what follows the objects. architectures: of GPUs, as
    TORCH_CUDA_ARCH_LIST has them."""

    name: str
    compile: tuple[str, ...]
    link: tuple[str, ...]
    architectures: str = ""

    @staticmethod
    def of(library: Library, environment: Mapping[str, str] = os.environ) -> "Toolchain":
        """Raises Unavailable."""
        if sys.platform != "linux":
            raise Unavailable(f"it is built on Linux only, and this is {sys.platform}")
        torch = _torch()
        if not library.cuda:
            return _host_compiler(library, torch, environment)
        if not _is_set(environment, "SORA_FAST_SKIP_CUDA"):
            return _nvcc(library, torch, environment)
        raise Unavailable("SORA_FAST_SKIP_CUDA is set")

    def command(self, library: Library, file: Path) -> tuple[str, ...] | None:
        """To compile one of the library's files; None: there is no GPU to compile it for."""
        if not library.cuda:
            return self.compile
        if not any(file.match(pattern) for pattern in library.hopper):
            return *self.compile, *gencode(self.architectures)
        return (*self.compile, *gencode("9.0a")) if "9.0" in self.architectures else None


def is_required(library: Library, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user wants an error where it cannot be built."""
    return library.cuda and _is_set(environment, "SORA_FAST_REQUIRE_CUDA")


def build(library: Library, target: Path, objects: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Build `target`, with objects kept in the folder `objects`. Returns what built it, for users.

    MAX_JOBS in the environment: how many compilers run at a time; default: as many as there are cores.
    Raises Unavailable where there is no compiler for it, or it fails.
    """
    toolchain = Toolchain.of(library, environment)
    folder = objects / library.name
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    jobs = int(environment.get("MAX_JOBS") or os.cpu_count() or 1)
    commands = {file: command for file in library.files if (command := toolchain.command(library, file))}
    with ThreadPoolExecutor(jobs) as pool:
        outputs = list(pool.map(lambda file: _compile(file, commands[file], folder), commands))
    command = [toolchain.compile[0], "-shared", "-o", str(target), *map(str, outputs), *toolchain.link]
    _run_unless_fresh(command, target, folder / "link.command", outputs)
    return toolchain.name


def _compile(file: Path, command: Sequence[str], folder: Path) -> Path:
    name = "-".join(file.relative_to(ROOT).parts)
    output, depends = folder / f"{name}.o", folder / f"{name}.d"
    command = [*command, "-MMD", "-MF", str(depends), "-c", str(file), "-o", str(output)]
    _run_unless_fresh(command, output, folder / f"{name}.command", _inputs(depends))
    return output


def _inputs(depends: Path) -> list[Path]:
    """What a file is made of, as its compiler wrote it down: "target: file file", with spaces in names escaped."""
    if not depends.exists():
        return []
    _, _, names = depends.read_text().replace("\\\n", " ").partition(":")
    return [Path(name) for name in shlex.split(names)]


def _run_unless_fresh(command: Sequence[str], output: Path, record: Path, inputs: Sequence[Path]) -> None:
    """record: where the command that made `output` is written down."""
    text = shlex.join(command)
    if inputs and output.exists() and record.exists() and record.read_text() == text:
        made = output.stat().st_mtime_ns
        if all(file.exists() and file.stat().st_mtime_ns <= made for file in inputs):
            return
    print(f"{text}\n", end="", flush=True)  # in one piece, beside those of other threads
    record.unlink(missing_ok=True)
    if subprocess.run(command).returncode:
        raise Unavailable(f"{Path(command[0]).name} failed on {output.name}, see above (pip install --verbose)")
    record.write_text(text)


@dataclass(frozen=True)
class _Torch:
    """The one that is built against. cuda: of its binaries; None of a CPU's."""

    folder: Path
    cuda: str | None

    @property
    def include(self) -> tuple[str, ...]:
        return ("-isystem", str(self.folder / "include"))


def _torch() -> _Torch:
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("torch is not there while it is built: pip install --no-build-isolation")
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "include/torch/csrc/stable/tensor.h").exists():
        raise Unavailable("this torch has no headers of the stable ABI")
    return _Torch(folder, runpy.run_path(str(folder / "version.py"))["cuda"])


def _host_compiler(library: Library, torch: _Torch, environment: Mapping[str, str]) -> Toolchain:
    found = _found_compiler(environment)
    link = (f"-L{torch.folder / 'lib'}", "-ltorch_cpu")
    return Toolchain(_version(found), (*found, *_flags(torch), *_OF_HOST, *library.flags), link)


def _nvcc(library: Library, torch: _Torch, environment: Mapping[str, str]) -> Toolchain:
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    path = shutil.which("nvcc", path=str(Path(home, "bin")) if home else environment.get("PATH"))
    if path is None:
        raise Unavailable(f"there is no nvcc {f'in {home}/bin' if home else 'on PATH, and CUDA_HOME is not set'}")
    release = re.search(r"release (\d+)\.(\d+)", _said((path, "--version")))
    version = (int(release[1]), int(release[2])) if release else (0, 0)
    if version < _MIN_NVCC:
        raise Unavailable(f"nvcc is {version[0]}.{version[1]}; it must be {_MIN_NVCC[0]}.{_MIN_NVCC[1]} or newer")
    if torch.cuda is not None and int(torch.cuda.split(".")[0]) != version[0]:
        raise Unavailable(f"nvcc is {version[0]}.{version[1]}, but torch was built with CUDA {torch.cuda}")
    host = (f"-ccbin={_found_compiler(environment)[0]}", f"-Xcompiler={','.join(_OF_HOST)}")
    # USE_CUDA: the stable headers hide what is for CUDA behind it.
    command = (path, *host, *_flags(torch), "-DUSE_CUDA", "-Xptxas=-warn-spills", *library.flags)
    architectures = environment.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    targets = ", ".join(flag.split("=")[-1] for flag in gencode(architectures))
    # A torch for CUDA has its CUDA parts behind libtorch; one for CPUs has none, and builds all the same.
    link = (f"-L{torch.folder / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu")
    return Toolchain(f"nvcc {version[0]}.{version[1]} for {targets}", command, link, architectures)


# What g++ and clang++ know, and nvcc passes on.
_OF_HOST = ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


def _flags(torch: _Torch) -> tuple[str, ...]:
    return ("-std=c++17", "-O3", f"-D{TORCH_TARGET}", f"-I{ROOT}", *torch.include)


def _found_compiler(environment: Mapping[str, str]) -> list[str]:
    found = shlex.split(environment.get("CXX", "")) or [*filter(None, map(shutil.which, ("g++", "c++", "clang++")))][:1]
    if not found or shutil.which(found[0]) is None:
        raise Unavailable(f"there is no C++ compiler ({found[0] if found else 'g++'})")
    return found


def gencode(architectures: str) -> tuple[str, ...]:
    """nvcc's flags for a list as TORCH_CUDA_ARCH_LIST has it: "8.0;9.0a+PTX". ValueError if it is none."""
    flags = []
    for name in architectures.replace(" ", ";").split(";"):
        match = _ARCHITECTURE.fullmatch(name)
        if match is None:
            raise ValueError(f'TORCH_CUDA_ARCH_LIST: {architectures!r}; it must be a list such as "8.0;9.0a+PTX"')
        major, minor, kind, ptx = match.groups()
        number = f"{major}{minor}{kind}"
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return tuple(flags)


def _version(command: Sequence[str]) -> str:
    return _said((*command, "--version")).splitlines()[0]


def _said(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "0") not in ("", "0")
