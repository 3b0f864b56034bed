"""Prove and time everything on a GPU, in one call, without a network.

    python -m benchmarks.gpu_suite --out DIR [--minutes 9] [--only attention] [--phases smoke headline] [--cache DIR]
        [--dry]

Runs from a checkout, installed or not. This process never touches the GPU: whatever does is a process of its own,
which may crash or hang and is then replaced by one that goes on with the next item. Nothing runs beside what is timed.
The phases, each with its hard end (benchmarks/timetable.py; nine minutes by default):

    versions    what runs here, and what the device reaches at best
    build       the compiled libraries, in the checkout, for this GPU: CUDA C++ where nvcc is
    smoke       every kernel in bf16 on a small ragged pack against fp64; the compilers' caches are filled meanwhile
    headline    our ops beside their peers, the most telling first
    tuning      attention's launch configurations; the winners go to kernels/_attention_measured.py and are used at once
    model       a whole model's call: eager, compiled, and as a CUDA graph; likewise a step of the sampling engine, and
                a training step beside PyTorch's with padding
    again       attention's smoke, if its configurations changed
    tests       the tests marked `gpu`, as many as there is time for
    sanitizer   compute-sanitizer, where it is installed

Writes to DIR, after every step, so that nothing is lost if it is cut off (by its own clock, Ctrl-C or SIGTERM), at
most four files: suite.json (everything measured, and what was not reached), validated.json (the backends that are from
now on chosen by default on this kind of GPU; it also replaces the one in sora_fast/ops/, and each record tells whether
it rests on smoke and cases alone or on all tests too), logs.tar.gz, and the table of configurations if it changed. The
summary comes last.

--only NAME ...: the ops whose names contain one of these. --cache DIR: kernels that `benchmarks.rehearsal --cache DIR`
compiled elsewhere, used if Triton is the same and this is a GPU of that kind; else it says why not. --dry walks the
same way small, interpreted where there is no GPU, and touches nothing outside DIR.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from benchmarks import _checkout
from benchmarks.timetable import SECONDS, ends

if TYPE_CHECKING:
    from benchmarks.session import Session


def run(session: "Session", seconds: float) -> int:
    """The phases one after the other; 0 if nothing went wrong, even if there was not time for everything."""
    from benchmarks.phases import PHASES
    from benchmarks.session import Stopped
    from benchmarks.summary import summary

    began = time.monotonic()
    stopped = ""
    try:
        with stopping_on_sigterm():
            for phase, end in ends(session.phases, seconds).items():
                start = time.monotonic()
                PHASES[phase](session, began + end)
                session.suite.seconds[phase] = round(time.monotonic() - start, 1)
                session.save()
    except (Stopped, KeyboardInterrupt) as reason:
        stopped = str(reason) or "Ctrl-C"
    if session.suite is None:
        print(stopped, file=sys.stderr)
        return 2
    session.suite.stopped = stopped
    session.suite.open("call", [phase for phase in session.phases if phase not in session.suite.seconds])
    session.save()
    print(summary(session.suite))
    return 1 if session.suite.failed else 0


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Raise Stopped inside."""
    from benchmarks.session import Stopped

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    from sora_fast.arguments import path

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="where results are written")
    parser.add_argument("--minutes", type=float, default=9, help="end within this time (default: 9)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=[""], help="only ops whose names contain one of these"
    )
    parser.add_argument("--phases", nargs="+", choices=list(SECONDS), metavar="PHASE", help="only these")
    parser.add_argument("--cache", type=path, metavar="DIR", help="kernels compiled elsewhere, by benchmarks.rehearsal")
    parser.add_argument("--dry", action="store_true", help="walk through it small, on a CPU too")
    parser.add_argument("--commit", help="commit to record, where the checkout carries no git data")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    _checkout.make_importable()
    from benchmarks.grid import OPS, WHOLES
    from benchmarks.outbox import Outbox
    from benchmarks.phases import WHOLE_MODELS
    from benchmarks.session import Session
    from benchmarks.tune import TABLE
    from sora_fast.files import check_folder

    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        check_folder(options.out)
    except ValueError as error:
        parser.error(f"--out {options.out}: {error}")
    everything = (OPS, (*WHOLES, *(module.OP for module in WHOLE_MODELS.values())))
    ops, wholes = (tuple(name for name in names if any(part in name for part in options.only)) for names in everything)
    if not ops + wholes:
        known = ", ".join(name for names in everything for name in names)
        parser.error(f"--only {' '.join(options.only)}: nothing is called so; there are {known}")
    # Where anything runs must be known.
    phases = tuple(phase for phase in SECONDS if phase in ("versions", *(options.phases or SECONDS)))
    with tempfile.TemporaryDirectory(prefix="gpu_suite-") as work:
        outbox = Outbox(Path(work), options.out, ("suite.json", "validated.json", TABLE))
        session = Session(outbox, phases, ops, wholes, options.dry, options.commit, options.cache)
        return run(session, 60 * options.minutes)


if __name__ == "__main__":
    sys.exit(main())
