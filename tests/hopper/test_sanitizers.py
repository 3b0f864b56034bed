"""The kernels and the emulator under AddressSanitizer and UBSan: what the emulator's own checks would not see.

Tensors are made by a Python whose allocations AddressSanitizer watches, so that what lies past their end is found.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.hopper.emulated import ROOT, SOURCES, compiler, sanitized
from tests.hopper.mutants import FORMS
from tests.hopper.test_emulator import CRIMES, INNOCENT

pytestmark = pytest.mark.slow

ATTEND = """
import sys
from pathlib import Path
from tests.hopper.emulated import Library
from tests.hopper.mutants import CASES, attend
kernels = Library(Path(sys.argv[1]))
for seed in range(2):
    for name in CASES:
        attend(name, kernels, seed)
"""
RUN = """
import ctypes, sys
run = ctypes.CDLL(sys.argv[1]).run_kernel
run.argtypes = ctypes.c_char_p, ctypes.c_uint64
for name in sys.argv[2:]:
    run(name.encode(), 0)
"""


@cache
def runtime() -> str:
    """Of the sanitizers, which must be there before Python's own allocations are, and what they look up in C++'s."""
    files = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [compiler(), f"-print-file-name={name}"]
        files.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not all(Path(file).is_absolute() for file in files):
        pytest.skip(f"{compiler()} has no AddressSanitizer as a shared library")
    return " ".join(files)


@pytest.fixture(autouse=True)
def _runtime() -> None:
    """Skips before anything is built, where it cannot be."""
    runtime()


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = {"LD_PRELOAD": runtime(), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **options}, capture_output=True, text=True, timeout=600)


@cache
def crimes() -> str:
    return str(sanitized("crimes", [Path(__file__).parent / "crimes.cpp"]))


def test_the_forward_is_clean() -> None:
    kernels = sanitized("forward", [SOURCES / "emulated" / "attention_forward.cpp"], f"-DEMULATED_FORMS={FORMS}")
    done = run(ATTEND, str(kernels))
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_emulator_is_clean_whatever_it_accuses() -> None:
    done = run(RUN, crimes(), *INNOCENT, *CRIMES)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("kernel", "words"),
    [("memory that is not there", "heap-buffer-overflow"), ("a sum that is too large", "signed integer overflow")],
)
def test_the_sanitizers_see_what_is_wrong(kernel: str, words: str) -> None:
    done = run(RUN, crimes(), kernel)
    assert done.returncode != 0 and words in done.stderr, done.stderr[-4000:]
