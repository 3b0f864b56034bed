"""Measure a case: everyone who can do its work, checked against fp64 and then timed in turn."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.entrants import Absent, Entrant, Ours, Tensors
from benchmarks.environment import Ceilings
from benchmarks.nvml import Gauge
from benchmarks.timing import Timing, Work, host_microseconds
from sora_fast.ops import _library, packed_attention
from sora_fast.ops._attention_cuda import refusal
from sora_fast.ops._dispatch import interpreting

DIRECTIONS = ("forward", "backward")
# How far from the truth: times PyTorch's fp32 sums rounded once, and besides. A peer may round products on its way to
# 16 bits, three in a row in attention's backward pass, and add 8,192 tokens one by one in fp32, which is 1.4e-6 off:
# what is asked of it is whether it does the same work at all.
_OURS, PEERS = (2.0, 1e-6), (4.0, 1e-5)
# Attention in plain PyTorch goes block by block; past so many tokens nobody would use it on a GPU.
_LONGEST_REFERENCE = 40_000

# Among those who are timed: no entrant, but a copy that moves as many bytes as the work must.
COPY = "copy"

Maker = Callable[[Case], Entrant]
Timer = Callable[[Mapping[str, Work]], dict[str, list[float]]]


def _torch(case: Case) -> Entrant:
    if case.op is packed_attention and case.args[0].is_cuda and len(case.args[0]) > _LONGEST_REFERENCE:
        raise Absent("a reference that takes seconds at this length")
    return Ours.on("torch", case)


def _triton(case: Case) -> Entrant:
    if not (case.device.type == "cuda" or interpreting()):
        raise Absent("Triton needs a GPU")
    if not case.has_kernels():
        raise Absent("it has no Triton kernel")
    return Ours.on("triton", case)


def _by_library(backend: str, case: Case) -> Entrant:
    if backend != case.device.type:
        raise Absent(f"it is for tensors on {backend}")
    if (reason := _library.missing(backend)) is not None:
        raise Absent(reason)
    if case.op.__name__ not in _compiled(backend):
        raise Absent("it is in no compiled library")
    if case.op is packed_attention and (reason := refusal(*case.args[:3])) is not None:
        raise Absent(reason)
    return Ours.on(backend, case)


def _compiled(backend: str) -> tuple[str, ...]:
    """Ops that the library of a backend has."""
    return (*_library.OPS, "packed_attention") if backend == "cuda" else _library.OPS


def ours(op: str) -> Mapping[str, Maker]:
    """Our own backends that an op has."""
    return {name: make for name, make in OURS.items() if name not in ("cpu", "cuda") or op in _compiled(name)}


# Our own backends; the peers stand in benchmarks/peers.
OURS: Mapping[str, Maker] = {
    "torch": _torch,
    "cpu": partial(_by_library, "cpu"),
    "triton": _triton,
    "cuda": partial(_by_library, "cuda"),
}


@dataclass
class Row:
    """One case in one direction.

    rounds: milliseconds, by who did it, and of a `COPY`. errors: likewise, of each output or gradient: the relative
    distance to what PyTorch gives in fp64; PyTorch's own in the case's dtype stands under "torch", timed or not. notes:
    likewise, what else was read. absent: who did not do it, and why.
    """

    op: str
    case: str
    direction: str
    bytes_moved: int = 0
    flops: int = 0
    tokens: int = 0
    series: str = ""
    rounds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failure: str = ""

    @property
    def times(self) -> dict[str, Timing]:
        return {name: Timing.of(rounds) for name, rounds in self.rounds.items()}

    def agrees(self, name: str, allowed: tuple[float, float] = _OURS) -> bool:
        """True if `name` is at most so many times as far from the truth as PyTorch in the same dtype, and so much."""
        times, more = allowed
        pairs = zip(self.errors.get(name, [float("nan")]), self.errors["torch"], strict=False)
        return not self.failure and all(ours <= times * plain + more for ours, plain in pairs)

    def rate(self, name: str, ceilings: Ceilings) -> tuple[float, str, float]:
        """What `name` reaches, its unit, and the share of the device's ceiling."""
        milliseconds = Timing.of(self.rounds[name]).median
        if self.flops:
            rate, unit, ceiling = self.flops / milliseconds / 1e9, "TFLOP/s", ceilings.teraflops
        else:
            rate, unit, ceiling = self.bytes_moved / milliseconds / 1e6, "GB/s", ceilings.gigabytes_per_second
        return rate, unit, rate / ceiling

    def record(self) -> dict[str, Any]:
        """Ready for JSON: times in place of the single rounds."""
        fields = {name: value for name, value in asdict(self).items() if name != "rounds"}
        return {**fields, "times": {name: asdict(time) for name, time in self.times.items()}}


def measure(
    case: Case,
    timer: Timer,
    makers: Mapping[str, Maker] = OURS,
    *,
    gauge: Gauge | None = None,
    directions: Sequence[str] = DIRECTIONS,
    with_copy: bool = False,
) -> list[Row]:
    """A row a direction. Who is too far from the truth is not timed; a failure of ours is one of the case.

    with_copy: time a copy beside what is limited by the bytes that it moves.
    """
    # Schedules are integers: they have no gradient.
    places = [DIRECTIONS.index(direction) for direction in directions if case.inputs or direction == "forward"]
    rows = [
        Row(case.op.__name__, case.label, DIRECTIONS[place], case.bytes_moved[place], case.flops[place])
        for place in places
    ]
    plain = Run(Ours.on("torch", case))
    truth = Run(Ours.on("torch", case.exact()), tuple(map(case.part, plain.upstream))).results
    runs: dict[str, Run] = {}
    for name, make in makers.items():
        try:
            entrant = make(case)
            runs[name] = plain if name == "torch" else Run(entrant, plain.upstream)
        except Exception as error:
            if name in OURS and not isinstance(error, Absent):
                raise
            reason = str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {error}"
            for row in rows:
                row.absent[name] = reason[:500]
    for place, row in zip(places, rows, strict=True):
        _check(row, {"torch": plain, **runs}, truth[place], place, case.part)
        taking_part = {name: run.work(place) for name, run in runs.items() if name not in row.absent}
        if taking_part:
            copied = with_copy and row.bytes_moved and not row.flops
            copy = {COPY: _copy(row.bytes_moved, case.device)} if copied else {}
            row.rounds = _timed({**taking_part, **copy}, timer)
        if gauge is not None:
            row.notes = {
                name: gauge.read(work, Timing.of(row.rounds[name]).median)
                | {"host_us": host_microseconds(work, case.device)}
                for name, work in taking_part.items()
            }
    return rows


def _copy(moved: int, device: torch.device) -> Work:
    """Reads one half of so many bytes and writes the other."""
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _timed(works: Mapping[str, Work], timer: Timer) -> dict[str, list[float]]:
    """Without the guards of compiled graphs, which look whether a graph fits the arguments: a model does that once a
    step, but here a graph is one op. Out of a cold cache they take up to 0.1 ms, beside ops of 0.2 to 4, and longest
    where an op has the most arguments."""
    try:
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            return timer(works)
    except RuntimeError:  # of somebody who compiles anew: then with guards, all of them
        return timer(works)


def _check(row: Row, runs: Mapping[str, "Run"], truth: Tensors, place: int, part: Callable[[Tensor], Tensor]) -> None:
    for name, run in runs.items():
        if not run.results[place]:
            row.absent[name] = "it has no backward pass here"
            continue
        row.errors[name] = distances(tuple(map(part, run.results[place])), truth)
        if name not in OURS and not row.agrees(name, PEERS):
            row.absent[name] = (
                f"wrong: {max(row.errors[name]):.1e} from the truth, where PyTorch is {max(row.errors['torch']):.1e}"
            )
        run.results[place] = ()  # large, and not needed again


class Run:
    """An entrant that has run once. results: of the forward and of the backward pass, in the case's own form.

    upstream: gradients of the outputs, in that form; None makes them, the same for every dtype, and exact in each.
    """

    def __init__(self, entrant: Entrant, upstream: Tensors | None = None) -> None:
        self.entrant = entrant
        self.outputs = entrant.run()
        outputs = tuple(entrant.unpack(output.detach()) for output in self.outputs)
        self.upstream = _small_integers(outputs) if upstream is None else upstream
        # A padded form has padding in its gradients, where anything may stand.
        self._gradients = tuple(entrant.pack(x.to(y.dtype)) for x, y in zip(self.upstream, outputs, strict=True))
        gradients: Tensors = ()
        if entrant.trains:
            gradients = tuple(map(entrant.unpack, entrant.differentiate(self.outputs, self._gradients)))
        self.results = [outputs, gradients]

    def work(self, place: int) -> Work:
        """One pass, forward or backward, as it is timed."""
        if place == 0:
            return self.entrant.run
        return lambda: self.entrant.differentiate(self.outputs, self._gradients)


def _small_integers(like: Tensors) -> Tensors:
    generator = torch.Generator(like[0].device).manual_seed(0)
    return tuple(torch.randint(-2, 3, x.shape, generator=generator, device=x.device).to(x.dtype) for x in like)


def distances(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """The relative distance of each tensor; NaN if it holds a NaN."""
    pairs = zip(ours, truth, strict=True)
    pairs = ((a.double(), b.double()) for a, b in pairs)
    return [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]


def start_afresh() -> None:
    """Before a case: the shapes of all would count as recompilations of one, and graphs that refer to themselves keep
    the tensors of the last until they are looked for."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failed(op: str, case: str, reason: str) -> Row:
    """In place of a case that was not measured."""
    return Row(op, case, "both", failure=reason[:2000])


def table(rows: Sequence[Row], ceilings: Ceilings) -> str:
    """A line a row: ours, what it takes of the host, the share of what is possible, a copy of as many bytes, and how
    much faster it is than the fastest of the others."""
    names = [f"{row.op}[{row.case}]" for row in rows]
    width = max(map(len, names), default=0)
    head = f"{'case':{width}}  direction    ours ms  host µs  rate              of best    copy ms  best of the others"
    lines = [f"{name:{width}}  {_line(row, ceilings)}" for name, row in zip(names, rows, strict=True)]
    return "\n".join([head, *lines])


def _line(row: Row, ceilings: Ceilings) -> str:
    if row.failure or not row.rounds:
        reason = row.failure or next(iter(row.absent.values()), "nobody did it")
        return f"{row.direction:9}  {reason.splitlines()[0][:90]}"
    times = row.times
    copy = times.pop(COPY, None)
    ours = next(name for name in ("triton", "torch", *times) if name in times)
    rate = ""
    if row.flops or row.bytes_moved:
        number, unit, share = row.rate(ours, ceilings)
        rate = f"{number:8.1f} {unit:7}  {share:7.0%}"
    host = row.notes.get(ours, {}).get("host_us")
    line = f"{row.direction:9}  {times[ours].median:9.3f}  {_number(host, 7, 0)}  {rate:25}"
    line += f"  {_number(copy and copy.median, 9, 3)}"
    others = {name: time.median for name, time in times.items() if name not in OURS}
    if others:
        best = min(others, key=others.__getitem__)
        line += f"  {best}: {others[best]:.3f} ms, ours {others[best] / times[ours].median:.2f}× as fast"
    return line.rstrip()


def _number(value: float | None, width: int, digits: int) -> str:
    return " " * width if value is None else f"{value:{width}.{digits}f}"


def absent(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Who did not take part and why: once, if the reason is the same everywhere, else with the case."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for name, reason in row.absent.items():
            reasons.setdefault(name, {}).setdefault(reason, []).append(f"{row.op}[{row.case}], {row.direction}")
    for name, places in reasons.items():
        for reason, where in places.items():
            yield (name, reason) if len(places) == 1 else (f"{name} on {where[0]} and {len(where) - 1} others", reason)
