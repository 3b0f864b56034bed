"""What the GPU suite launches, over the stub driver: bound, compiled for sm_90, loaded and launched, and not run.

So nothing here waits for, reads or judges a result: it is whatever the memory held.
"""

from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import stub_driver

_STUB = stub_driver.activate()  # before the first kernel is imported

from triton.runtime.errors import OutOfResources  # noqa: E402  (needs what stands above)

from benchmarks import grid, smoke, tune  # noqa: E402
from benchmarks.rows import OURS, Run, start_afresh  # noqa: E402
from benchmarks.steps import model as whole_model  # noqa: E402
from benchmarks.steps import tuning  # noqa: E402
from sora_fast import use_backend  # noqa: E402
from sora_fast.kernels._launch import target_arch  # noqa: E402
from sora_fast.proof.cases import OPS  # noqa: E402
from sora_fast.proof.judge import results  # noqa: E402
from sora_fast.proof.rule import poisoned_scratch  # noqa: E402

# Of the GPU that is rehearsed for; tensors stay on the CPU.
GPU, _DTYPE, _CPU = "cuda:0", torch.bfloat16, torch.device("cpu")
Rehearsal = Callable[[str], list[str]]


def step(device: torch.device, *, phase: str) -> Callable[[str], dict[str, Any]]:
    """Of an item's name in a phase of the suite: how many launches it makes, and what is absent on the GPU too.

    Raises what a launch raises, and RuntimeError if there is none.
    """
    rehearse = _PHASES[phase]()

    def do(name: str) -> dict[str, Any]:
        start_afresh()
        before = _STUB.num_launches
        with patch.object(F, "linear", _allocated):
            absent = rehearse(name)
        launches = _STUB.num_launches - before
        if not launches:
            raise RuntimeError("no kernel was launched")
        return {"launches": launches, "absent": absent}

    return do


def _smoke() -> Rehearsal:
    known = {plan.name: plan for plan in smoke.plans(OPS, GPU)}

    def do(name: str) -> list[str]:
        trial = known[name].build(_CPU)
        with poisoned_scratch():
            results(trial.call.on("triton"), trial)
        return []

    return do


def _headline() -> Rehearsal:
    known = {plan.name: plan for plan in grid.headline()}

    def do(name: str) -> list[str]:
        Run(OURS["triton"](known[name].build(_CPU, _DTYPE)))
        return []

    return do


def _tuning() -> Rehearsal:
    known, major = {item.name: item for item in tune.items()}, target_arch(_CPU)[0]

    def do(name: str) -> list[str]:
        item, absent = known[name], []
        case = tuning.case_of(item, _CPU, _DTYPE)
        for blocks in tuning.candidates_of(item, _CPU):
            with tuning.configured(item, blocks, major):
                try:
                    case.forward() if item.kernel == "forward" else case.step()
                except OutOfResources as error:  # as it will be there
                    absent.append(f"{tune.name(blocks)}: {error}")
        return absent

    return do


def _model() -> Rehearsal:
    model = whole_model.random_model(whole_model.XL, _CPU, _DTYPE)

    def do(name: str) -> list[str]:
        batch = whole_model.inputs(model.config, name.split(", ")[1], _CPU)
        with use_backend("triton"):
            whole_model.call(model, batch)
        return []

    return do


_PHASES: Mapping[str, Callable[[], Rehearsal]] = {
    "smoke": _smoke,
    "headline": _headline,
    "model": _model,
    "tuning": _tuning,
}


class _Allocation(torch.autograd.Function):
    """A linear map of which only the results' memory is taken: a CPU would compute it for minutes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return x.new_empty(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else torch.empty_like(x) for x in ctx.saved_tensors)


def _allocated(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In place of F.linear."""
    return _Allocation.apply(x, weight, bias)
