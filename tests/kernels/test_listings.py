"""What makes the row kernels fast and no result shows: their loads are on their way before anything is waited for."""

import json
import os
import subprocess
import sys

from benchmarks._checkout import ROOT


def test_no_load_waits_behind_a_reduction() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.listings"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout.splitlines()[-1])
    assert len(kernels) == 6, kernels
    assert {name: found["late"] for name, found in kernels.items()} == dict.fromkeys(kernels, 0)
    # Rows and bias are laid out alike: nothing but the sums of the bias's gradient passes through shared memory.
    barriers = {name: found["barriers"] for name, found in kernels.items() if name.startswith("mlp")}
    assert min(barriers.values()) == 0 and max(barriers.values()) <= 2, barriers
