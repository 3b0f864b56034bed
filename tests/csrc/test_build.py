"""How the libraries are built: nothing twice, and never in silence without one."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from csrc import build
from csrc.build import CPU, CUDA, Library, Toolchain, Unavailable, gencode

ROOT = Path(__file__).resolve().parent.parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
TWO = Library("_two", ("*.cpp",), "nothing works")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files, one of which includes a header."""
    folder = tmp_path / "a source"
    folder.mkdir()
    (folder / "one.h").write_text("int one();\n")
    (folder / "one.cpp").write_text('#include "one.h"\nint one() { return 1; }\n')
    (folder / "two.cpp").write_text("int two() { return 2; }\n")
    monkeypatch.setattr(build, "ROOT", folder)
    return folder


def touch(file: Path) -> None:
    later = file.stat().st_mtime_ns + 10**10
    os.utime(file, ns=(later, later))


@needs_compiler
def test_only_what_changed_is_built_again(sources: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def built(library: Library = TWO) -> set[str]:
        said = build.build(library, tmp_path / "_two.so", tmp_path / "objects", dict(os.environ))
        assert "++" in said
        commands = map(shlex.split, capfd.readouterr().out.splitlines())
        return {Path(words[words.index("-o") + 1]).name for words in commands}

    assert built() == {"one.cpp.o", "two.cpp.o", "_two.so"}
    assert built() == set()
    touch(sources / "two.cpp")
    assert "two.cpp.o" in built()
    touch(sources / "one.h")
    assert "one.cpp.o" in built()
    assert built(Library("_two", ("*.cpp",), "", flags=("-DOTHER",))) >= {"one.cpp.o", "two.cpp.o"}


def test_what_a_file_is_made_of(tmp_path: Path) -> None:
    """As g++ writes it, and as nvcc does."""
    depends = tmp_path / "one.d"
    for text in ("one.o: /a\\ b/one.cpp \\\n /a\\ b/one.h\n", "one.o : /a\\ b/one.cpp \\\n    /a\\ b/one.h \n"):
        depends.write_text(text)
        assert build._inputs(depends) == [Path("/a b/one.cpp"), Path("/a b/one.h")]


@needs_compiler
def test_a_file_that_does_not_compile_is_named(sources: Path, tmp_path: Path) -> None:
    (sources / "two.cpp").write_text("int two() { return }\n")
    with pytest.raises(Unavailable, match=r"\+\+ failed on two.cpp.o"):
        build.build(TWO, tmp_path / "_two.so", tmp_path / "objects", dict(os.environ))


def command(path: Path, says: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)


def on_path(tmp_path: Path, nvcc: str | None = "Cuda compilation tools, release 13.0, V13.0.88") -> dict[str, str]:
    """An environment with a compiler and with nvcc."""
    command(tmp_path / "bin" / "g++", "g++ 12")
    if nvcc:
        command(tmp_path / "bin" / "nvcc", nvcc)
    return {"PATH": f"{tmp_path}/bin:/bin", "CXX": f"{tmp_path}/bin/g++"}


def test_nvcc_is_found(tmp_path: Path) -> None:
    there = on_path(tmp_path)
    for environment in (there, {**there, "PATH": "/nowhere", "CUDA_HOME": str(tmp_path)}):
        found = Toolchain.of(CUDA, environment)
        assert found.name == "nvcc 13.0 for sm_80, compute_80, sm_90a"
        assert found.compile[0] == f"{tmp_path}/bin/nvcc" and f"-ccbin={tmp_path}/bin/g++" in found.compile
    named = Toolchain.of(CUDA, {**there, "TORCH_CUDA_ARCH_LIST": "8.6 9.0"})
    assert named.name == "nvcc 13.0 for sm_86, sm_90"


def test_what_is_written_for_hopper_is_compiled_for_hopper_alone(tmp_path: Path) -> None:
    there = on_path(tmp_path)
    files = [build.ROOT / "cuda" / name for name in ("attention_forward_64.cu", "patches.cu")]
    of_both = Toolchain.of(CUDA, there)
    flags = [[flag for flag in of_both.command(CUDA, file) or () if "gencode" in flag] for file in files]
    assert flags == [list(gencode("9.0a")), list(gencode("8.0+PTX;9.0a"))]
    of_ampere = Toolchain.of(CUDA, {**there, "TORCH_CUDA_ARCH_LIST": "8.0"})
    assert of_ampere.command(CUDA, files[0]) is None and of_ampere.command(CUDA, files[1])


@pytest.mark.parametrize(
    ("changes", "nvcc", "reason"),
    [
        ({"SORA_FAST_SKIP_CUDA": "1"}, "release 13.0", "SORA_FAST_SKIP_CUDA is set"),
        ({}, None, "there is no nvcc on PATH, and CUDA_HOME is not set"),
        ({"CUDA_HOME": "/nowhere"}, "release 13.0", "there is no nvcc in /nowhere/bin"),
        ({}, "release 11.8", "nvcc is 11.8; it must be 12.0 or newer"),
        ({"CXX": "/nowhere/g++"}, "release 13.0", "there is no C.. compiler ./nowhere/g.."),
    ],
)
def test_why_there_are_no_kernels(changes: dict[str, str], nvcc: str | None, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=reason):
        Toolchain.of(CUDA, {**on_path(tmp_path, nvcc), **changes})


def test_another_cuda_than_torch_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = build._torch()
    for version, fits in (("13.2", True), ("12.8", False), (None, True)):
        monkeypatch.setattr(build, "_torch", lambda version=version: build._Torch(torch.folder, version))
        if fits:
            assert Toolchain.of(CUDA, on_path(tmp_path))
        else:
            with pytest.raises(Unavailable, match=r"nvcc is 13.0, but torch was built with CUDA 12.8"):
                Toolchain.of(CUDA, on_path(tmp_path))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    with pytest.raises(Unavailable, match=r"there is no C\+\+ compiler \(g\+\+\)"):
        Toolchain.of(CPU, {})


def test_architectures() -> None:
    assert gencode("8.0;9.0a+PTX") == (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    )
    for wrong in ("Hopper", "90", "8.0;;9.0", ""):
        with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST: .* it must be a list such as"):
            gencode(wrong)


def setup(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What setup.py builds without a compiler, and what it writes down."""
    built = tmp_path / "built"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", f"--build-lib={built}", f"--build-temp={tmp_path}"]
    given = {**os.environ, "CXX": "/nowhere/g++", **environment}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=given)
    record = built / "sora_fast" / "built.txt"
    return done, record.read_text().splitlines() if record.exists() else []


def test_without_a_compiler_the_package_is_built_and_says_so(tmp_path: Path) -> None:
    done, said = setup(tmp_path, SORA_FAST_SKIP_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert said[0].startswith("_cpu: not built: there is no C++ compiler (/nowhere/g++); so on a CPU")
    assert said[1].startswith("_cuda: not built: SORA_FAST_SKIP_CUDA is set; so there are no kernels")
    assert all(f"sora_fast.{line}" in done.stderr for line in said)


def test_kernels_that_are_demanded_are_an_error_where_they_cannot_be_built(tmp_path: Path) -> None:
    done, _ = setup(tmp_path, SORA_FAST_REQUIRE_CUDA="1")
    assert done.returncode != 0 and "but SORA_FAST_REQUIRE_CUDA is set" in done.stderr
