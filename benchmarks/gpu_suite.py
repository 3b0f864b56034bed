"""Prove and time everything on a GPU, in one call, without a network.

    python -m benchmarks.gpu_suite --out DIR [--minutes 9] [--only attention] [--dry]
    python -m benchmarks.gpu_suite --out DIR --tune packed_attention

Runs from a checkout, installed or not, in this order: what the device reaches at best; the tests marked `gpu`, and
compute-sanitizer where it is installed, while the compilers' caches fill; every case of benchmarks/cases.py, which
validates the ops; the plans of benchmarks/grid.py beside all peers, the most telling first.

Writes to DIR, after every step, so that nothing is lost if it is cut off (by its own clock, Ctrl-C or SIGTERM):
suite.json (everything measured), logs and reports of the tests, and validated.json, the backends that are from now on
chosen by default on this kind of GPU, because their op's tests passed and its cases agreed with fp64. That file
also replaces the one in sora_fast/ops/. The table comes last.

--only NAME: the ops whose names contain it. --dry walks the same way small, interpreted where there is no GPU, and
touches nothing outside DIR. --tune OP tries the candidates of the op's configuration table and rewrites it.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch

from benchmarks import _checkout
from benchmarks.jobs import Job, run_jobs
from benchmarks.nvml import Gauge
from benchmarks.timing import time_variants

if TYPE_CHECKING:
    from benchmarks.grid import Plan
    from benchmarks.rows import Maker, Timer
    from benchmarks.suite import Suite

# Share of the time that tests may take, and seconds that are kept for the end.
_TESTS_SHARE, _RESERVE = 0.5, 10
# Processes that fill the caches; each holds a GPU's context and one case.
_WARMERS = 4


class Stopped(BaseException):
    """Time is up, or somebody wants this to end. No error: what handles those must not swallow it."""


@dataclass(frozen=True)
class Scope:
    """What a call looks at. wholes: see benchmarks/grid.py. seconds: in which all of it must end."""

    device: torch.device
    ops: tuple[str, ...]
    wholes: tuple[str, ...]
    seconds: float
    dry: bool = False

    @property
    def compared(self) -> tuple[str, ...]:
        return *self.ops, *self.wholes

    @property
    def workers(self) -> int:
        return 1 if self.dry else max(2, min(14, (os.cpu_count() or 1) - 2))

    def plans(self) -> "list[Plan]":
        from benchmarks.grid import Plan, headline, plans
        from benchmarks.shapes import Model

        if self.dry:
            return [Plan("packed_attention", Model(64, 1), "tiny", "frame_causal")]
        first = [plan for plan in headline() if plan.op in self.compared]
        # What time is left goes round the ops.
        rounds = zip_longest(*(plans(op, on_gpu=True) for op in self.compared))
        return list(dict.fromkeys([*first, *(plan for plans in rounds for plan in plans if plan)]))

    def makers(self, op: str) -> "Mapping[str, Maker]":
        from benchmarks.peers import everyone

        slow = ("compiled", "Flex") if self.dry else ()  # minutes of compiling prove little on a CPU
        return {name: maker for name, maker in everyone(op).items() if not any(part in name for part in slow)}

    def timer(self, seconds: float) -> "Timer":
        # Small cases prove that everything runs; their times, interpreted, say nothing.
        limits = {"max_samples": 1, "warmup": 0} if self.dry else {"seconds": seconds}
        return partial(time_variants, device=self.device, **limits)


@contextmanager
def stopping_after(seconds: float) -> Iterator[None]:
    """Raise Stopped inside when `seconds` have passed, or on SIGTERM."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("out of time" if number == signal.SIGALRM else signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGTERM)}
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def run(folder: Path, scope: Scope, *, commit: str | None = None) -> int:
    """The whole suite; 0 if nothing went wrong, even if there was not time for everything."""
    from benchmarks.environment import Ceilings, environment
    from benchmarks.suite import DRY, Suite
    from sora_fast.ops._records import Machine

    end = time.monotonic() + scope.seconds - min(_RESERVE, 0.1 * scope.seconds)
    folder.mkdir(parents=True, exist_ok=True)
    record = environment(commit)
    print(json.dumps(record, indent=1), flush=True)
    machine = Machine.of(scope.device)
    machine = replace(machine, device_class=DRY) if scope.dry else machine
    suite = Suite(folder, machine, record, Ceilings.measure(scope.device))
    try:
        with stopping_after(end - time.monotonic()):
            suite.expected = _expected(scope)
            suite.planned = _headline(scope)
            _prove(suite, scope, time.monotonic() + _TESTS_SHARE * scope.seconds)
            _validate(suite, scope)
            suite.save_validated()
            _compare(suite, scope)
    except (Stopped, KeyboardInterrupt) as reason:
        suite.stopped = str(reason) or "Ctrl-C"
    suite.save_validated()
    suite.save()
    print(suite.summary())
    return 1 if suite.failed else 0


def _expected(scope: Scope) -> list[tuple[str, str]]:
    """The names of the cases that validate: those of tiny tensors are called the same."""
    from benchmarks.cases import Setting, all_cases

    small = Setting.small(torch.device("cpu"))
    if not scope.dry:
        real = Setting.on_gpu()
        small = replace(small, widths=real.widths, head_dims=real.head_dims, heads=real.heads)
    names = [(case.op.__name__, case.label) for case in all_cases(small)]
    return [name for name in names if name[0] in scope.ops]


def _headline(scope: Scope) -> list[tuple[str, str]]:
    """The names of the plans that a call should reach; of the others only those that it did are told."""
    from benchmarks.grid import headline

    return [] if scope.dry else [(plan.op, plan.label) for plan in headline() if plan.op in scope.compared]


def _prove(suite: "Suite", scope: Scope, deadline: float) -> None:
    """Tests, compute-sanitizer, and the walkers that fill the caches, side by side."""
    from benchmarks.gpu_tests import jobs_of_tests, read_results
    from benchmarks.sanitizer import read_sanitizer, sanitizer_job

    folder = suite.folder
    tests = jobs_of_tests(folder, scope.ops[:1], others=False, shards=1) if scope.dry else None
    tests = tests or jobs_of_tests(folder, scope.ops, others=len(scope.ops) > 1)
    sanitizer = sanitizer_job(folder, scope.ops)
    jobs = [*filter(None, [sanitizer]), *_walkers(folder, scope), *tests]
    codes = run_jobs(jobs, workers=scope.workers, deadline=deadline)
    suite.tests = read_results(folder, tests, codes)
    suite.sanitizer = read_sanitizer(sanitizer, codes)
    suite.save()


def _walkers(folder: Path, scope: Scope) -> list[Job]:
    walk = [sys.executable, "-m", "benchmarks.walk"]
    if scope.dry:
        return [Job("walk", [*walk, "small", "--ops", "segment_mean"], folder / "walk.log")]
    return [
        Job(
            f"walk-{place}",
            [*walk, "warm", "--share", f"{place}/{_WARMERS}", "--ops", *scope.compared],
            folder / f"walk-{place}.log",
            {"TORCHINDUCTOR_COMPILE_THREADS": "2"},
        )
        for place in range(_WARMERS)
    ]


def _validate(suite: "Suite", scope: Scope) -> None:
    from benchmarks.cases import Setting, all_cases
    from benchmarks.rows import OURS, try_to_measure

    setting = Setting.small(scope.device) if scope.dry else Setting.on_gpu()
    for case in all_cases(setting):
        if case.op.__name__ in scope.ops:
            suite.cases += try_to_measure(case, scope.timer(0.2), OURS, None)
            suite.save()


def _compare(suite: "Suite", scope: Scope) -> None:
    from benchmarks.rows import start_afresh, try_to_measure

    gauge = Gauge(scope.device) if scope.device.type == "cuda" else None
    for plan in scope.plans():
        start_afresh()
        rows = try_to_measure(plan.build(scope.device), scope.timer(1.0), scope.makers(plan.op), gauge)
        suite.compared += [replace(row, tokens=plan.tokens, series=plan.series) for row in rows]
        suite.save()


def _parser() -> argparse.ArgumentParser:
    from sora_fast.arguments import path

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="where results are written")
    parser.add_argument("--minutes", type=float, default=9, help="end within this time (default: 9)")
    parser.add_argument("--only", metavar="NAME", default="", help="only the ops whose names contain this")
    parser.add_argument("--tune", metavar="OP", help="try the op's configurations and rewrite their table")
    parser.add_argument("--dry", action="store_true", help="walk through it small, on a CPU too")
    parser.add_argument("--commit", help="commit to record, where the checkout carries no git data")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    _checkout.make_importable()
    from benchmarks.grid import OPS, WHOLES
    from sora_fast.files import check_folder

    parser = _parser()
    options = parser.parse_args(arguments)
    if not on_gpu and not options.dry:
        parser.error("there is no CUDA device here; --dry walks through the suite on a CPU")
    try:
        check_folder(options.out)
    except ValueError as error:
        parser.error(f"--out {options.out}: {error}")
    ops, wholes = (tuple(name for name in names if options.only in name) for names in (OPS, WHOLES))
    if not ops + wholes:
        parser.error(f"--only {options.only}: nothing is called so; there are {', '.join(OPS + WHOLES)}")
    scope = Scope(torch.device("cuda" if on_gpu else "cpu"), ops, wholes, 60 * options.minutes, options.dry)
    if options.tune:
        from benchmarks.tune import TUNABLE

        if options.tune not in TUNABLE:
            parser.error(f"--tune {options.tune}: no such op has a table to tune; {', '.join(TUNABLE)} has")
        options.out.mkdir(parents=True, exist_ok=True)
        TUNABLE[options.tune](options.out, scope.device, scope.timer(1.0), dry=scope.dry)
        return 0
    return run(options.out, scope, commit=options.commit)


if __name__ == "__main__":
    sys.exit(main())
