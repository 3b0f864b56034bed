"""Which launch configuration of attention is the fastest: candidates, trials, and the table of the winners.

A number changes only where a candidate is faster than the present one beyond the spread of their rounds. Candidates run
in processes, by benchmarks/steps/tuning.py; the winners go to kernels/_attention_measured.py, which is written whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from typing import Any

from benchmarks.timing import Timing

Numbers = tuple[int, ...]

# As `BlockSizes`: (own, other, num_warps, num_stages, programs a multiprocessor: 1 if it is left out). Those that spill
# or do not fit on chip are slow or fail, and so drop out.
CANDIDATES: Mapping[str, tuple[Numbers, ...]] = {
    "forward": (
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (64, 64, 4, 2, 2),
        (64, 64, 4, 3, 2),
    ),
    "grad_query": (
        (128, 128, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 32, 8, 2),
        (64, 64, 4, 2, 2),
        (64, 128, 4, 2),
    ),
    "grad_key_value": (
        (128, 64, 8, 2),
        (128, 32, 8, 2),
        (128, 32, 8, 3),
        (64, 64, 4, 2, 2),
        (64, 64, 4, 3, 2),
        (64, 128, 8, 2),
    ),
    "one_pass": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2, 2), (64, 32, 4, 2, 2), (64, 16, 8, 2)),
}
# Of the head dims that video models have, the commonest first.
HEAD_DIMS = (128, 64, 72)
# Kinds of masks, as the kernels call them, and the mask that stands for each (benchmarks/shapes.py).
KINDS: Mapping[str, str] = {"full": "full", "boxes": "window"}
TABLE = "_attention_measured.py"


@dataclass(frozen=True)
class Item:
    """What is tried in one go: the candidates of a pass, for a head dim and a kind of mask."""

    head_dim: int
    mask: str
    kernel: str

    @property
    def name(self) -> str:
        return f"D{self.head_dim}, {self.mask}, {self.kernel}"


@dataclass(frozen=True)
class Trial(Item):
    """A configuration that was tried. present: it is the one in use. time: of the whole direction; absent: why there is
    none."""

    blocks: Numbers
    present: bool = False
    time: Timing | None = None
    absent: str = ""


@dataclass(frozen=True)
class Winner(Item):
    """What the table should say, and why."""

    blocks: Numbers
    reason: str


def items() -> list[Item]:
    """All of them, the most telling first."""
    return [Item(head_dim, mask, kernel) for mask in KINDS for head_dim in HEAD_DIMS for kernel in CANDIDATES]


def read(content: Mapping[str, Any]) -> Trial:
    """From JSON."""
    time = content["time"]
    return Trial(**{**content, "blocks": tuple(content["blocks"]), "time": time and Timing(**time)})


def name(blocks: Numbers) -> str:
    """128×64 w8 s3, and p2 for two programs a multiprocessor."""
    own, other, warps, stages, programs = (*blocks, 1)[:5]
    return f"{own}×{other} w{warps} s{stages}" + (f" p{programs}" if programs > 1 else "")


def winners(trials: Sequence[Trial]) -> Iterator[Winner]:
    """The fastest of each item, where it beats the present one."""
    for item in dict.fromkeys((trial.head_dim, trial.mask, trial.kernel) for trial in trials):
        here = [trial for trial in trials if (trial.head_dim, trial.mask, trial.kernel) == item]
        present = next((trial for trial in here if trial.present), None)
        timed = [trial for trial in here if trial.time and not trial.present]
        if present is None or not timed:
            continue
        best = min(timed, key=lambda trial: trial.time.median)
        if present.time is None:
            yield Winner(*item, best.blocks, f"{name(present.blocks)} does not run")
        elif best.time.high < present.time.low:
            gain = present.time.median / best.time.median
            yield Winner(*item, best.blocks, f"{gain:.2f}× as fast as {name(present.blocks)}")


def one_pass_up_to(trials: Sequence[Trial]) -> int | None:
    """The widest head up to which, at every head dim and mask tried, one pass beats the best that was seen of two; None
    if nowhere both were tried."""
    compared = {}
    for head_dim, mask in dict.fromkeys((trial.head_dim, trial.mask) for trial in trials):
        here = [trial for trial in trials if (trial.head_dim, trial.mask) == (head_dim, mask) and trial.time]
        one = [trial.time for trial in here if trial.kernel == "one_pass"]
        two = [trial.time for trial in here if trial.kernel.startswith("grad_")]
        if one and two:
            compared[head_dim, mask] = min(one, key=_median).high < min(two, key=_median).low
    widest = 0
    for head_dim in sorted({head_dim for head_dim, _ in compared}):
        if not all(wins for (dim, _), wins in compared.items() if dim == head_dim):
            break
        widest = head_dim
    return widest if compared else None


def _median(time: Timing) -> float:
    return time.median


def written(folder: Path, trials: Sequence[Trial], *, major: int, where: str) -> str | None:
    """The table of `folder` with the winners in it; None if nothing would change.

    where: the device and the date, of GPUs of compute capability `major`.
    """
    measured, one_pass = _read(folder / TABLE)
    found = {(major, w.kernel, w.head_dim, w.mask): (w.blocks, f"{where}: {w.reason}") for w in winners(trials)}
    widest = one_pass_up_to(trials)
    known = one_pass.get(major, (0, ""))[0]
    changed = {} if widest in (None, known) else {major: (widest, f"{where}: as far as it was tried")}
    if not found and not changed:
        return None
    head = (folder / TABLE).read_text(encoding="utf-8").split(_MEASURED)[0]
    return head + _table(_MEASURED, measured | found) + _COMMENT + _table(_ONE_PASS, one_pass | changed)


_MEASURED = "MEASURED: dict[tuple[int, str, int, str], tuple[tuple[int, ...], str]]"
_COMMENT = """
# Major compute capability → (the widest head at which the backward pass in one beats that in two, reason).
"""
_ONE_PASS = "ONE_PASS_UP_TO: dict[int, tuple[int, str]]"


def _read(table: Path) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """MEASURED and ONE_PASS_UP_TO of a file, which need not be the one in use."""
    found = run_path(str(table))  # not an import, which may take what it kept of a file written in the same second
    return found["MEASURED"], found["ONE_PASS_UP_TO"]


def _table(head: str, entries: Mapping[Any, tuple[Any, str]]) -> str:
    """As ruff leaves it."""
    lines = [
        f"    {_literal(key)}: (\n        {_literal(value)},\n        {_literal(reason)},\n    ),\n"
        for key, (value, reason) in sorted(entries.items())
    ]
    return f"{head} = {{\n{''.join(lines)}}}\n" if lines else f"{head} = {{}}\n"


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))})"
    return f'"{value}"' if isinstance(value, str) else str(value)
