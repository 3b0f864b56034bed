"""Measure a case on every backend that it has here, and print what came out."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.cases import Case, Setting, all_cases
from benchmarks.environment import Ceilings
from benchmarks.timing import Timing, time_variants
from sora_fast import use_backend


@dataclass
class Row:
    """One case in one direction. times: by backend; difference: of a backend's results to "torch", relative."""

    op: str
    case: str
    direction: str
    bytes_moved: int = 0
    flops: int = 0
    times: dict[str, Timing] = field(default_factory=dict)
    difference: dict[str, float] = field(default_factory=dict)
    error: str = ""


def measure_all(device: torch.device, *, small: bool, deadline: float) -> list[Row]:
    """Every case, one after the other; an error, or `deadline` (of time.monotonic), becomes a row that says so."""
    setting = Setting.small(device) if small else Setting.on_gpu()
    seconds, max_samples = (0.0, 1) if small else (0.5, 200)
    rows: list[Row] = []
    for case in all_cases(setting):
        name = (case.op.__name__, case.label, "both")
        if time.monotonic() > deadline:
            rows.append(Row(*name, error="not run: out of time"))
            continue
        print(f"timing {case.name}", file=sys.stderr)
        try:
            rows += measure(case, device, seconds=seconds, max_samples=max_samples)
        except Exception as error:  # one broken op must not cost the others their numbers
            rows.append(Row(*name, error=f"{type(error).__name__}: {error}"[:2000]))
    return rows


def measure(case: Case, device: torch.device, *, seconds: float, max_samples: int) -> list[Row]:
    """Time `case` forward and backward on PyTorch and, where it has kernels, on Triton; compare the results."""
    directions = ("forward", "backward")
    rows = [
        Row(case.op.__name__, case.label, direction, bytes_moved, flops)
        for direction, bytes_moved, flops in zip(directions, case.bytes_moved, case.flops, strict=True)
    ]
    runs = {"torch": _Run(case, "torch")}
    if case.has_kernels():
        runs["triton"] = _Run(case, "triton")
    for row, direction in zip(rows, directions, strict=True):
        calls = {backend: getattr(run, direction) for backend, run in runs.items()}
        reference = calls["torch"]()
        row.difference = {backend: _difference(call(), reference) for backend, call in calls.items()}
        row.times = time_variants(calls, device=device, seconds=seconds, max_samples=max_samples)
    return rows


class _Run:
    """A case on one backend."""

    def __init__(self, case: Case, backend: str) -> None:
        self.case, self.backend = case, backend
        self.outputs = self.forward()
        # The same for every backend: a generator of its own.
        generator = torch.Generator(self.outputs[0].device).manual_seed(0)
        self.gradients = tuple(torch.empty_like(output).normal_(generator=generator) for output in self.outputs)

    def forward(self) -> tuple[Tensor, ...]:
        with use_backend(self.backend):
            return self.case.forward()

    def backward(self) -> tuple[Tensor, ...]:
        with use_backend(self.backend):
            return self.case.backward(self.outputs, self.gradients)


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest relative difference of two lists of tensors; NaN if there is a NaN."""
    distances = [
        (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30) for a, b in zip(ours, theirs, strict=True)
    ]
    return float(torch.stack(distances).max())


def table(rows: Sequence[Row], ceilings: Ceilings) -> str:
    """A line a row: milliseconds, speed-up over PyTorch, and the share of what the device reaches at best."""
    names = [f"{row.op}[{row.case}]" for row in rows]
    width = max(map(len, names), default=0)
    head = f"{'case':{width}}  direction   torch ms  triton ms   faster  rate             of best  difference"
    lines = [f"{name:{width}}  {_line(row, ceilings)}" for name, row in zip(names, rows, strict=True)]
    return "\n".join([head, *lines])


def _line(row: Row, ceilings: Ceilings) -> str:
    if row.error:
        return f"{row.direction:9}  {row.error.splitlines()[0][:90]}"
    plain = row.times["torch"].median
    best = row.times.get("triton", row.times["torch"]).median
    rate, unit, ceiling = row.bytes_moved / best / 1e6, "GB/s", ceilings.gigabytes_per_second
    if row.flops:
        rate, unit, ceiling = row.flops / best / 1e9, "TFLOP/s", ceilings.teraflops
    shared = f"{rate:8.1f} {unit:7}  {rate / ceiling:7.0%}"
    if "triton" not in row.times:
        return f"{row.direction:9}  {plain:9.3f}  {'':9}  {'':7}  {shared}"
    difference = row.difference["triton"]
    return f"{row.direction:9}  {plain:9.3f}  {best:9.3f}  {plain / best:6.2f}×  {shared}  {difference:10.1e}"
