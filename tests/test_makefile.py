"""The Makefile's treatment of an environment that is there already."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def _make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "Makefile", folder)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV", "MAKEFLAGS")}
    command = ["make", *arguments, "VENV=env"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


def _environment(folder: Path, script: str) -> None:
    python = folder / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


def test_another_python_than_the_environments_is_refused(tmp_path: Path) -> None:
    _environment(tmp_path, "echo Python 3.9.1 of /elsewhere")
    done = _make(tmp_path, "lint", f"PYTHON={sys.executable}")
    assert done.returncode != 0
    assert f"env holds Python 3.9.1 of /elsewhere, but PYTHON={sys.executable} is Python 3." in done.stderr
    assert "make clean" in done.stderr
    assert "pip" not in done.stdout, "nothing may be installed"


def test_the_environments_own_python_is_fine(tmp_path: Path) -> None:
    _environment(tmp_path, f'exec {sys.executable} "$@"')
    done = _make(tmp_path, "same-python", f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stderr


def test_only_a_python_that_was_asked_for_is_looked_at(tmp_path: Path) -> None:
    _environment(tmp_path, "exit 1")
    for file in ("pyproject.toml", "setup.py"):
        (tmp_path / file).touch()
    assert "base_prefix" in _make(tmp_path, "--dry-run", "lint", "PYTHON=python3").stdout
    assert "base_prefix" not in _make(tmp_path, "--dry-run", "lint").stdout
