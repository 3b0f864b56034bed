"""Measure a case on every backend that it has here, and print what came out."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Setting, measured_cases
from benchmarks.environment import Ceilings
from benchmarks.timing import Timing, Work, time_variants
from sora_fast import use_backend


@dataclass
class Row:
    """One case in one direction.

    times: by backend. errors: by backend, of each output or gradient: the relative distance to what PyTorch gives in
    the next wider dtype.
    """

    op: str
    case: str
    direction: str
    bytes_moved: int = 0
    flops: int = 0
    times: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)
    failure: str = ""

    def agrees(self, backend: str) -> bool:
        """True if `backend` is at most twice as far from the truth as PyTorch in the same dtype, beyond 1e-6."""
        pairs = zip(self.errors.get(backend, [float("nan")]), self.errors["torch"], strict=False)
        return not self.failure and all(ours <= 2 * plain + 1e-6 for ours, plain in pairs)


def measure_all(device: torch.device, *, small: bool, deadline: float) -> list[Row]:
    """Every case, one after the other; an error, or `deadline` (of time.monotonic), becomes a row that says so."""
    setting = Setting.small(device) if small else Setting.on_gpu()
    timer = partial(time_variants, device=device)
    # Small cases prove that everything runs; their times, interpreted, say nothing.
    timer = partial(timer, max_samples=1, warmup=0) if small else partial(timer, seconds=0.5)
    rows: list[Row] = []
    for case in measured_cases(setting):
        name = (case.op.__name__, case.label, "both")
        if time.monotonic() > deadline:
            rows.append(Row(*name, failure="not run: out of time"))
            continue
        print(f"timing {case.name}", file=sys.stderr)
        try:
            rows += measure(case, timer)
        except Exception as error:  # one broken op must not cost the others their numbers
            rows.append(Row(*name, failure=f"{type(error).__name__}: {error}"[:2000]))
    return rows


def measure(case: Case, timer: Callable[[dict[str, Work]], dict[str, Timing]]) -> list[Row]:
    """Time `case` forward and backward on PyTorch and, where it has kernels, on Triton; compare the results."""
    runs = {"torch": _Run(case, "torch")}
    if case.has_kernels():
        runs["triton"] = _Run(case, "triton")
    truth = _Run(case.widened(), "torch").results
    rows = []
    for place, direction in enumerate(("forward", "backward")):
        row = Row(case.op.__name__, case.label, direction, case.bytes_moved[place], case.flops[place])
        row.errors = {name: _distances(run.results[place], truth[place]) for name, run in runs.items()}
        row.times = timer({name: getattr(run, direction) for name, run in runs.items()})
        rows.append(row)
    return rows


class _Run:
    """A case on one backend, run once. results: of the forward and of the backward pass."""

    def __init__(self, case: Case, backend: str) -> None:
        self.case, self.backend = case, backend
        self.outputs = self.forward()
        # The same upstream gradients for every backend, and exact in every dtype.
        generator = torch.Generator(self.outputs[0].device).manual_seed(0)
        self.gradients = tuple(
            torch.randint(-2, 3, output.shape, generator=generator, device=output.device).to(output.dtype)
            for output in self.outputs
        )
        self.results = (tuple(output.detach() for output in self.outputs), self.backward())

    def forward(self) -> tuple[Tensor, ...]:
        with use_backend(self.backend):
            return self.case.forward()

    def backward(self) -> tuple[Tensor, ...]:
        with use_backend(self.backend):
            return self.case.backward(self.outputs, self.gradients)


def _distances(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """The relative distance of each tensor; NaN if it holds a NaN."""
    pairs = zip(ours, truth, strict=True)
    return [float((a.to(b.dtype) - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]


def table(rows: Sequence[Row], ceilings: Ceilings) -> str:
    """A line a row: milliseconds, speed-up over PyTorch, and the share of what the device reaches at best."""
    names = [f"{row.op}[{row.case}]" for row in rows]
    width = max(map(len, names), default=0)
    head = (
        f"{'case':{width}}  direction   torch ms  triton ms   faster  rate             of best  torch err  triton err"
    )
    lines = [f"{name:{width}}  {_line(row, ceilings)}" for name, row in zip(names, rows, strict=True)]
    return "\n".join([head, *lines])


def _line(row: Row, ceilings: Ceilings) -> str:
    if row.failure:
        return f"{row.direction:9}  {row.failure.splitlines()[0][:90]}"
    plain = row.times["torch"].median
    best = row.times.get("triton", row.times["torch"]).median
    rate, unit, ceiling = row.bytes_moved / best / 1e6, "GB/s", ceilings.gigabytes_per_second
    if row.flops:
        rate, unit, ceiling = row.flops / best / 1e9, "TFLOP/s", ceilings.teraflops
    shared = f"{rate:8.1f} {unit:7}  {rate / ceiling:7.0%}"
    if "triton" not in row.times:
        return f"{row.direction:9}  {plain:9.3f}  {'':9}  {'':7}  {shared}"
    errors = f"{max(row.errors['torch']):9.1e}  {max(row.errors['triton']):9.1e}"
    return f"{row.direction:9}  {plain:9.3f}  {best:9.3f}  {plain / best:6.2f}×  {shared}  {errors}"
