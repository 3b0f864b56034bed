"""Where the numbers come from: versions, the machine, and what its device reaches at best."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.environment import Ceilings, environment
from sora_fast.ops._records import Machine


def step(device: torch.device, *, commit: str | None, dry: bool) -> Callable[[str], Any]:
    """Of any name: {"device", "environment", "machine", "ceilings"}; of a CPU the first alone, unless the walk is dry.
    commit: see `environment`."""

    def do(name: str) -> dict[str, Any]:
        if device.type == "cpu" and not dry:
            return {"device": "cpu"}
        return {
            "device": "cuda:0" if device.type == "cuda" else "cpu",
            "environment": environment(commit),
            "machine": asdict(Machine.of(device)),
            "ceilings": asdict(Ceilings.measure(device)),
        }

    return do
