"""What the host may take for each op: a guard, in bare launches by Triton of the same run and the same moment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import stub_driver
from benchmarks._checkout import ROOT

# Bare launches (7 µs on a 2 GHz core under Python 3.11) that a call may take: 30% more than it was measured to.
MOST = {
    "packed_attention, full": 10.7,
    "packed_attention, window": 8.6,
    "qk_norm_rope": 7.2,
    "adaln": 4.1,
    "gated_residual": 3.4,
    "gated_residual_adaln": 4.7,
    "mlp_activation": 2.8,
    "patch_embed": 5.5,
    "unpatchify": 6.8,
    "linear_unpatchify": 7.0,
    "block": 45.5,
}


@pytest.fixture(scope="module")
def times(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Microseconds a call, by name."""
    if reason := stub_driver.why_not():
        pytest.skip(reason)
    file = tmp_path_factory.mktemp("host_time") / "times.json"
    return measured(file)


def measured(file: Path) -> dict[str, float]:
    """In a process of its own, since this one interprets kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.host_time", "--json", str(file), "--rounds", "500"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", MOST)
def test_the_host_is_quick(name: str, times: dict[str, float]) -> None:
    launches = times[name] / times["bare launch"]
    assert launches <= MOST[name], f"{times[name]:.1f} µs a call, {launches:.1f} bare launches"


def test_nothing_is_left_unguarded(times: dict[str, float]) -> None:
    assert times.keys() == {"bare launch", *MOST}
