"""Cases whose kernel, an interpreted one, is broken in a way of its own: for processes that judge them."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sora_fast.proof import cases
from sora_fast.proof.cases import Plan, Trial

BROKEN = "unpatchify"


def _wrong(result: Tensor) -> Tensor:
    return result * 1.001


def _unwritten(result: Tensor) -> Tensor:
    result[3] = torch.empty(())
    return result


def _hang(result: Tensor) -> Tensor:
    time.sleep(600)
    return result


def _end(how: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    def end(result: Tensor) -> Tensor:
        how()
        return result

    return end


def _raise(error: BaseException) -> None:
    raise error


HOW: dict[str, Callable[[Tensor], Tensor]] = {
    "wrong": _wrong,
    "unwritten": _unwritten,
    "segfault": _end(lambda: os.kill(os.getpid(), signal.SIGSEGV)),
    "right in between": lambda result: result,
    "hang": _hang,
    "raises": _end(lambda: _raise(RuntimeError("device-side assert"))),
    "half": lambda result: result.half(),
    "no memory on the GPU": _end(lambda: _raise(torch.OutOfMemoryError("CUDA out of memory"))),
    "no memory": _end(lambda: torch.zeros(1 << 50)),
    "killed": _end(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "leaves": _end(lambda: os._exit(0)),
    "prints": _end(lambda: os.write(1, b"{noise}\\n")),
}


def offered(op: str, device: str) -> list[Plan]:
    """One intact plan of every op; of `BROKEN` the same one broken in each of the ways."""
    plan = next(plan for plan in cases.offered(op, device) if plan.dtype in (torch.float32, None))
    if op != BROKEN:
        return [plan]
    plans = [replace(plan, label=name, build=partial(_build, plan, name)) for name in HOW]
    # A hang takes as long as its judge has patience: told apart, so that not all must be judged in a hurry.
    return [replace(plan, dtype=torch.float16) if plan.label == "hang" else plan for plan in plans]


def _build(plan: Plan, name: str, device: torch.device) -> Trial:
    from sora_fast.kernels import unpatchify as kernels

    scatter = getattr(kernels.scatter, "intact", kernels.scatter)

    def broken(*args: Any) -> Tensor:
        return HOW[name](scatter(*args))

    broken.intact = scatter
    kernels.scatter = broken
    return plan.build(device)
