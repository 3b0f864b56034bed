"""Launch plans, over the stub driver: Triton's real launcher, in a process of its own, since this one interprets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import stub_driver
from tests.kernels.under_stub import CHECKS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    """What went wrong in each check; nothing in those that hold."""
    if reason := stub_driver.why_not():
        pytest.skip(reason)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.under_stub"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_plan(name: str, wrong: dict[str, str]) -> None:
    assert not wrong[name], wrong[name]
