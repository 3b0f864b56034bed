"""Smoke: every kernel on a small ragged pack against fp64, in processes of their own, as `sora_fast.prove` does it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from sora_fast.ops._records import dtype_name
from sora_fast.proof.cases import OPS, Plan, offered
from sora_fast.proof.children import NO_TIME, Verdict
from sora_fast.proof.proving import tasks_of
from sora_fast.proof.tasks import Task

# What became of a plan.
PASS, FAIL, CRASH, OPEN = "PASS", "FAIL", "CRASH", "not known"


@dataclass(frozen=True)
class Smoke:
    """A plan, and what became of it. dtype: as records have it. backend: whose kernels."""

    op: str
    dtype: str
    name: str
    status: str = OPEN
    reason: str = NO_TIME
    backend: str = "triton"

    def settled(self, verdict: Verdict) -> "Smoke":
        status = {"passed": PASS, "unjudged": OPEN}.get(verdict.verdict, CRASH if verdict.lost_its_process else FAIL)
        return replace(self, status=status, reason=verdict.reason)

    def __str__(self) -> str:
        return f"{self.status:9} {self.name}{f': {self.reason}' if self.reason else ''}"


def plans(ops: Sequence[str], device: str, *, dry: bool = False, compiled: Collection[str] = ()) -> list[Plan]:
    """All of bf16, or of fp32 where they are interpreted. dry: the first of every op, which shows that everything
    runs. compiled: ops whose kernels in CUDA C++ are tried
    too."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    found = [
        [plan for plan in offered(op, device, compiled=compiled) if plan.dtype in (dtype, None)]
        for op in OPS
        if op in ops
    ]
    return [plan for of_op in found for plan in of_op[: 1 if dry else None]]


def tasks(found: Sequence[Plan], device: str, seconds: float) -> list[Task]:
    """A process an op, or a family of one that takes long to compile."""
    return list(tasks_of(found, Task("", device, (), seconds, program="benchmarks.prover")))


def entries(found: Sequence[Plan]) -> dict[str, Smoke]:
    """By name; nothing has become of them yet."""
    return {plan.name: Smoke(plan.op, dtype_name(plan.dtype), plan.name, backend=plan.backend) for plan in found}
