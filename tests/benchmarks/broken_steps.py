"""A step of the GPU suite whose items go wrong in every way."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch


def _raise() -> None:
    raise ValueError("no such thing\nand more")


HOW: dict[str, Callable[[], Any]] = {
    "good": lambda: {"rows": [1.5]},
    "raises": _raise,
    "after it, in the same process": os.getpid,
    "garbage": lambda: os.write(1, b"noise\n{\n[]\n"),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "after it, in another process": os.getpid,
    "hang": lambda: time.sleep(600),
    "last": os.getpid,
}


def step(device: torch.device, *, word: str) -> Callable[[str], Any]:
    print(f"the log's {word} on {device}")
    return lambda name: HOW[name]()
