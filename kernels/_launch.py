"""The one door through which every Triton kernel is launched."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from triton.runtime import driver

from sora_fast.kernels import _plans


@dataclass
class Recorder:
    """Collects launches instead of making them: (kernel, positional arguments, keyword arguments)."""

    arch: tuple[int, int]
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


_recorder: ContextVar[Recorder | None] = ContextVar("sora_fast_recorder", default=None)


@contextmanager
def recording(arch: tuple[int, int]) -> Iterator[Recorder]:
    """Inside, kernels are not run but recorded, with the configuration that they would have on `arch`."""
    recorder = Recorder(arch)
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def target_arch(device: torch.device) -> tuple[int, int]:
    """Compute capability that launches on tensors of `device` are configured for. On a CPU: that of Hopper."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.arch
    return _capability(device) if device.type == "cuda" else (9, 0)


def num_multiprocessors(device: torch.device) -> int:
    """Of the GPU that persistent kernels are launched on. On a CPU a few, so that every program has several turns."""
    return _properties(device).multi_processor_count if device.type == "cuda" else 3


@cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def _capability(device: torch.device) -> tuple[int, int]:
    properties = _properties(device)
    return properties.major, properties.minor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel` over `grid`. meta: constexpr arguments, num_warps, num_stages."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append((kernel, args, meta))
        return
    if 0 in grid:
        return
    device = _device(args)
    if device < 0 or device == driver.active.get_current_device():
        _plans.run(kernel, grid, args, meta)
    else:
        with torch.cuda.device(device):
            _plans.run(kernel, grid, args, meta)


def _device(args: tuple[Any, ...]) -> int:
    """Of the first tensor; −1: a CPU, as under the interpreter."""
    for arg in args:
        first = arg[0] if isinstance(arg, tuple) and arg else arg
        if isinstance(first, torch.Tensor):
            return first.get_device()
    raise TypeError("args: no tensor among them; a kernel must have one")


def cdiv(size: int, step: int) -> int:
    """How many steps cover `size`: triton.cdiv, which on the host takes 2 µs."""
    return -(-size // step)


def next_power_of_two(size: int) -> int:
    """Least power of two that is not below `size`: Triton's block shapes."""
    return 1 << (size - 1).bit_length()
