"""Rehearse the GPU suite's launches without a GPU, so that no lent minute is lost to what any machine can show.

    python -m benchmarks.rehearsal [--phases smoke headline model tuning] [--only NAME ...] [--cache DIR] [--logs DIR]

Every kernel that the suite's smoke, headline, model and tuning launch, at their sizes, goes through Triton's own JIT
and launcher, compiled for sm_90, over a stub driver (benchmarks/stub_driver): an error in a signature, a grid, a
descriptor or a constant shows here. Nothing runs: neither values nor times mean anything, and CUDA's events, streams
and graphs, torch.compile, the peers, the steps of sampling and of training (the same kernels at other sizes) and the
tests marked `gpu` are not rehearsed. What does not fit on the chip is
told apart: the tuner drops such candidates there, too.

Takes a few GB of memory, and as long as Triton compiles: some eight minutes on a core without the tuner's candidates,
the first time. --cache: where all that Triton has kept of sm_90 (in TRITON_CACHE_DIR, where others may have left
theirs) is written, for `gpu_suite --cache` on a machine with the same Triton and Python. --logs: where the processes'
output is written, a file each. Exit code 1 if a launch failed.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import _checkout, stub_driver
from benchmarks.tasks import Task

# The tuner's candidates, which are the most, come last.
PHASES = ("smoke", "headline", "model", "tuning")
_STEP = "benchmarks.steps.rehearsing"
# Seconds: for a process to start and draw a model's weights; that an item may take, which compiles up to a dozen
# kernels of a minute at the most; that all may.
_START, _ITEM, _TOTAL = 300.0, 900.0, 6 * 3600.0


def items(phase: str) -> Mapping[str, list[str]]:
    """Names of what a phase of the suite launches on a GPU, by op."""
    from benchmarks import grid, smoke, tune
    from benchmarks.steps import model
    from sora_fast.proof.cases import OPS

    if phase == "smoke":
        pairs = [(plan.op, plan.name) for plan in smoke.plans(OPS, "cuda:0")]
    elif phase == "headline":
        pairs = [(plan.op, plan.name) for plan in grid.headline()]
    elif phase == "model":
        pairs = [(model.OP, name) for name in model.cases(dry=False)]
    else:
        pairs = [("packed_attention", item.name) for item in tune.items()]
    return {op: [name for own, name in pairs if own == op] for op in dict.fromkeys(op for op, _ in pairs)}


def tasks(phases: Sequence[str], only: Sequence[str]) -> Iterator[Task]:
    """A process an op of a phase. only: parts of the names of items."""
    for phase in phases:
        for names in items(phase).values():
            wanted = tuple(name for name in names if any(part in name for part in only))
            if wanted:
                yield Task(_STEP, wanted, "cpu", {"phase": phase}, _TOTAL)


def rehearse(found: Sequence[Task], logs: Path) -> int:
    """Do all of it, a line an item; 1 if one failed."""
    from sora_fast.proof.children import Limits, child_environment, judged

    began, launches, failed = time.monotonic(), 0, []
    limits = Limits(start=_START, plan=_ITEM, total=_TOTAL)
    phases = {name: task.options["phase"] for task in found for name in task.names}
    for verdict in judged(found, limits, child_environment(interpreted=False), logs=logs):
        title = f"{phases[verdict.plan]}: {verdict.plan}"
        if verdict.verdict == "passed":
            launches += verdict.found["launches"]
            print(f"launched {verdict.found['launches']:5}×  {title}", flush=True)
            for reason in verdict.found["absent"]:
                print(f"    does not fit: {reason}", flush=True)
        else:
            failed.append(title)
            print(f"FAILED           {title}: {verdict.reason}", flush=True)
    print(
        f"{launches} launches in {time.monotonic() - began:.0f} s, {len(failed)} items failed. "
        "All were made over a stub driver, which runs nothing: this says nothing about values or times."
    )
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    _checkout.make_importable()
    from sora_fast.arguments import path

    parser = argparse.ArgumentParser(prog="python -m benchmarks.rehearsal", description=__doc__.splitlines()[0])
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), metavar="PHASE", help="only these")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[""], help="only items whose names contain one")
    parser.add_argument("--logs", type=path, metavar="DIR", help="keep what the processes print")
    parser.add_argument("--cache", type=path, metavar="DIR", help="write what was compiled to this folder")
    options = parser.parse_args(arguments)
    if reason := stub_driver.why_not():
        parser.error(reason)
    found = list(tasks(options.phases, options.only))
    if not found:
        parser.error(f"--only {' '.join(options.only)}: nothing is called so")
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as work:
        code = rehearse(found, options.logs or Path(work))
    if options.cache:
        print(f"{_packed(options.cache)} compiled kernels in {options.cache}")
    return code


def _packed(folder: Path) -> int:
    import triton

    from benchmarks import travelling

    return travelling.pack(Path(triton.knobs.cache.dir), folder, target="sm_90")


if __name__ == "__main__":
    sys.exit(main())
