"""Do work without timing it: to fill the caches of the compilers before the clock runs, and for compute-sanitizer.

    python -m benchmarks.walk small [--ops NAME ...]         every case at its smallest, on Triton
    python -m benchmarks.walk warm --share 0/4 [--ops ...]   a fourth of what the GPU suite will time, peers included

A failure in `warm` is printed and passed over: whoever times the same work says what it was.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch

from benchmarks import _checkout
from benchmarks.timing import Work


def walk_small(device: torch.device, ops: Sequence[str]) -> None:
    """Forward and backward of every small case, with the kernels alone."""
    from benchmarks.cases import Setting, all_cases
    from sora_fast import use_backend

    for case in all_cases(Setting.small(device)):
        if case.op.__name__ in ops:
            print(case.name, flush=True)
            with use_backend("triton"):
                case.step()


def warm(device: torch.device, ops: Sequence[str], place: int, count: int) -> None:
    """Every entrant of the cases and of the headline's plans, once."""
    from benchmarks.cases import Case, Setting, all_cases
    from benchmarks.grid import headline
    from benchmarks.peers import everyone
    from benchmarks.rows import OURS, Maker, start_afresh, try_to_measure

    def work() -> Iterator[tuple[Case, Mapping[str, Maker]]]:
        for number, case in enumerate(all_cases(Setting.on_gpu())):
            if number % count == place:
                yield case, OURS
        for plan in list(headline())[place::count]:
            if plan.op in ops:
                yield plan.build(device), everyone(plan.op)

    for case, makers in work():
        if case.op.__name__ in ops:
            start_afresh()
            rows = try_to_measure(case, _untimed, makers, None)
            print(*(row.failure for row in rows if row.failure), sep="\n", flush=True)


def _untimed(variants: Mapping[str, Work]) -> dict[str, list[float]]:
    return {name: [0.0] for name in variants}


def main(arguments: Sequence[str] | None = None) -> int:
    from benchmarks.grid import OPS, WHOLES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.walk", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["small", "warm"])
    parser.add_argument("--ops", nargs="+", default=list(OPS + WHOLES), choices=OPS + WHOLES)
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every N-th from the I-th on")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.what == "small":
        walk_small(device, options.ops)
    else:
        warm(device, options.ops, *map(int, options.share.split("/")))
    return 0


if __name__ == "__main__":
    _checkout.make_importable()
    sys.exit(main())
