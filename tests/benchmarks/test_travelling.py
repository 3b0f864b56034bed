"""Compiled kernels that travel to another folder, and are found there by Triton for a source in another one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import stub_driver, travelling
from benchmarks._checkout import ROOT
from tests.benchmarks.triton_cache import keep


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """As Triton leaves it: a kernel, one for another GPU, and a launcher."""
    folder = tmp_path / "cache"
    for name, arch in (("KERNEL", 90), ("ANOTHER", 80)):
        keep(folder / name, arch)
    (folder / "LAUNCHER").mkdir()
    (folder / "LAUNCHER" / "launcher.so").write_text("bound to this machine")
    return folder


def test_a_launch_finds_what_it_needs_and_nothing_else_travels(cache: Path, tmp_path: Path) -> None:
    packed, there = tmp_path / "packed", tmp_path / "there"
    assert travelling.pack(cache, packed, target="sm_90") == 1
    assert str(tmp_path) not in (packed / "KERNEL" / "__grp__k.json").read_text()
    shutil.rmtree(cache)
    assert travelling.why_not(packed, target="sm_90") is None
    assert travelling.unpack(packed, there) == 1
    assert [file.name for file in there.iterdir()] == ["KERNEL"]
    paths = json.loads((there / "KERNEL" / "__grp__k.json").read_text())["child_paths"]
    assert paths == {name: str(there / "KERNEL" / name) for name in ("k.json", "k.cubin")}
    assert Path(paths["k.cubin"]).read_text() == "the cubin" and "90" in Path(paths["k.json"]).read_text()


def test_why_it_is_of_no_use(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "packed"
    assert travelling.why_not(packed, target="sm_90").startswith(f"no compiled kernels in {packed}: ")
    travelling.pack(cache, packed, target="sm_90")
    assert "target sm_90, here sm_100" in travelling.why_not(packed, target="sm_100")
    monkeypatch.setattr("triton.runtime.cache.triton_key", lambda: "another build of the same version")
    assert "Triton's files" in travelling.why_not(packed, target="sm_90")


# Compiles a kernel that lies beside it, launches it, and prints how many were compiled.
LAUNCH = """
import sys
from benchmarks import stub_driver
stub_driver.activate()
import torch, triton
compiled = []
triton.knobs.compilation.listener = lambda *, metadata_group, cache_hit, **_: compiled.append(not cache_hit)
from a_kernel import double
double[(1,)](torch.zeros(64), 64, BLOCK=64)
print(sum(compiled), "of", len(compiled))
"""
KERNEL = """
import triton
import triton.language as tl

@triton.jit
def double(x, size, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(x + place, tl.load(x + place, mask=place < size) * 2, mask=place < size)
"""


@pytest.mark.skipif(bool(stub_driver.why_not()), reason=str(stub_driver.why_not()))
def test_triton_finds_it_for_the_same_source_elsewhere(tmp_path: Path) -> None:
    def launched(place: str, cache: Path) -> str:
        (tmp_path / place).mkdir()
        (tmp_path / place / "a_kernel.py").write_text(KERNEL)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / place}", "TRITON_CACHE_DIR": str(cache)}
        command = [sys.executable, "-c", LAUNCH]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert launched("here", tmp_path / "cache") == "1 of 1"
    assert travelling.pack(tmp_path / "cache", tmp_path / "packed", target="sm_90") == 1
    shutil.rmtree(tmp_path / "cache")
    travelling.unpack(tmp_path / "packed", tmp_path / "other")
    assert launched("there", tmp_path / "other") == "0 of 1"
