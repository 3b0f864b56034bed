"""Do every case at its smallest on the kernels, forward and backward, without timing it: for compute-sanitizer.

python -m benchmarks.walk [--ops NAME ...]
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks import _checkout


def walk(device: torch.device, ops: Sequence[str]) -> None:
    """Those of `ops`."""
    from benchmarks.cases import Setting, all_cases
    from sora_fast import use_backend

    for case in all_cases(Setting.small(device)):
        if case.op.__name__ in ops:
            print(case.name, flush=True)
            with use_backend("triton"):
                case.step()


def main(arguments: Sequence[str] | None = None) -> int:
    from benchmarks.grid import OPS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.walk", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    walk(torch.device("cuda" if torch.cuda.is_available() else "cpu"), parser.parse_args(arguments).ops)
    return 0


if __name__ == "__main__":
    _checkout.make_importable()
    sys.exit(main())
