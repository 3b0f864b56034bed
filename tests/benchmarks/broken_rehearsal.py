"""A step of the rehearsal, some of whose launches go wrong."""

from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.broken_steps import HOW

_LAUNCHED = {"launches": 2, "absent": []}


def step(device: torch.device, *, phase: str) -> Callable[[str], dict[str, Any]]:
    def do(name: str) -> dict[str, Any]:
        HOW[name]()
        return {**_LAUNCHED, "absent": ["128×128 w8 s3: out of resource"]} if name == "good" else _LAUNCHED

    return do
