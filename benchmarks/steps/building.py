"""Building the compiled libraries in the checkout, for the PyTorch and the GPU that are there."""

from collections.abc import Callable

import torch

from benchmarks._checkout import ROOT


def step(device: torch.device) -> Callable[[str], str]:
    """Of a library's name, "cpu" or "cuda": what built it. Raises csrc.build.Unavailable, with the reason."""
    from csrc import build

    libraries = {library.name.removeprefix("_"): library for library in build.INSTALLED}

    def do(name: str) -> str:
        target = ROOT / "sora_fast" / f"_{name}.abi3.so"
        return build.build(libraries[name], target, ROOT / "build" / "csrc")

    return do
