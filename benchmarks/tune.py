"""Try the candidates of an op's configuration table, and write the fastest into it with the reason.

A number changes only where a candidate is faster than the present one beyond the spread of their rounds. Every trial
is kept in tune.json.
"""

import ast
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks._checkout import ROOT
from benchmarks.cases import Case
from benchmarks.entrants import Entrant, Ours
from benchmarks.environment import environment
from benchmarks.grid import Plan
from benchmarks.rows import DIRECTIONS, Maker, Timer, measure
from benchmarks.shapes import Model
from benchmarks.timing import Timing
from sora_fast import use_backend
from sora_fast.kernels import _attention_config as config
from sora_fast.kernels._attention_config import BlockSizes
from sora_fast.kernels._launch import target_arch

# (own, other, num_warps, num_stages). Those that spill or do not fit on chip are slow or fail, and so drop out.
_CANDIDATES: Mapping[str, tuple[tuple[int, int, int, int], ...]] = {
    "forward": (
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 32, 8, 3),
        (64, 64, 4, 3),
    ),
    "grad_query": (
        (128, 128, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 32, 8, 3),
        (64, 64, 4, 2),
        (64, 128, 4, 2),
    ),
    "grad_key_value": (
        (128, 64, 8, 2),
        (128, 32, 8, 2),
        (128, 32, 8, 3),
        (64, 128, 8, 2),
        (64, 64, 8, 2),
        (64, 64, 4, 2),
    ),
    "one_pass": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 3)),
}
# A winner speaks for its own head dim alone.
_ALL_HEAD_DIMS = range(32, 257, 8)
# Of the head dims that video models have, the commonest first.
_HEAD_DIMS = (128, 64, 72)
_MARK = "# Measured on "
Table = list[tuple[int, BlockSizes]]


@dataclass(frozen=True)
class Trial:
    """A configuration of a pass at one head dim. time: of the whole direction. absent: why there is none."""

    kernel: str
    head_dim: int
    blocks: BlockSizes
    time: Timing | None = None
    absent: str = ""


@dataclass(frozen=True)
class Winner:
    """What the table should say, and why."""

    kernel: str
    head_dim: int
    blocks: BlockSizes
    reason: str


def tune_attention(folder: Path, device: torch.device, timer: Timer, *, small: bool = False) -> list[Trial]:
    """Every candidate of every pass, on 32k ragged tokens under the full mask; tune.json grows as it goes."""
    arch, trials = target_arch(device), []
    for head_dim in _HEAD_DIMS[-1:] if small else _HEAD_DIMS:
        heads, pack = (1, "tiny") if small else (16, "32k ragged")
        case = Plan("packed_attention", Model(heads * head_dim, heads), pack, "full").build(device)
        for kernel, numbers in _CANDIDATES.items():
            present = config.block_sizes(kernel, torch.bfloat16, head_dim, arch)
            candidates = list(dict.fromkeys([present, *(BlockSizes(*n) for n in numbers[: 2 if small else None])]))
            print(f"trying {len(candidates)} configurations of {kernel} at head dim {head_dim}", file=sys.stderr)
            trials += try_all(case, kernel, head_dim, candidates, arch[0], timer)
            text = json.dumps([asdict(trial) for trial in trials], indent=1)
            (folder / "tune.json").write_text(text + "\n")
    return trials


def try_all(
    case: Case, kernel: str, head_dim: int, candidates: Sequence[BlockSizes], major: int, timer: Timer
) -> list[Trial]:
    """Time `candidates` in turn: those that compile, fit, and agree with fp64."""
    direction = DIRECTIONS[0] if kernel == "forward" else DIRECTIONS[1]
    makers = {name(blocks): _maker(kernel, blocks, major) for blocks in candidates}
    (row,) = measure(case, timer, makers, directions=[direction])
    times, absent = row.times, row.absent
    return [
        Trial(kernel, head_dim, blocks, times.get(name(blocks)), absent.get(name(blocks), "")) for blocks in candidates
    ]


def _maker(kernel: str, blocks: BlockSizes, major: int) -> Maker:
    @contextmanager
    def configured() -> Iterator[None]:
        form = dict.fromkeys(config.ONE_PASS, 256 if kernel == "one_pass" else 0)
        table = patch.dict(config._TABLES[kernel], {major: [(256, blocks)]})
        with table, patch.dict(config.ONE_PASS, form), use_backend("triton"):
            yield

    def make(case: Case) -> Entrant:
        return Ours(case.inputs, lambda *_: case.forward(), within=configured, case=case)

    return make


def name(blocks: BlockSizes) -> str:
    """As the comments of the table have it: 128×64 w8 s3."""
    return f"{blocks.own}×{blocks.other} w{blocks.num_warps} s{blocks.num_stages}"


def winners(trials: Sequence[Trial]) -> Iterator[Winner]:
    """The fastest of each pass and head dim, where it beats the present one, which is the first of its trials."""
    for key in dict.fromkeys((trial.kernel, trial.head_dim) for trial in trials):
        present, *others = [trial for trial in trials if (trial.kernel, trial.head_dim) == key]
        timed = [trial for trial in others if trial.time]
        if not timed:
            continue
        best = min(timed, key=lambda trial: trial.time.median)
        if present.time is None:
            yield Winner(*key, best.blocks, f"{name(best.blocks)}; {name(present.blocks)} does not run")
        elif best.time.high < present.time.low:
            gain = present.time.median / best.time.median
            yield Winner(*key, best.blocks, f"{name(best.blocks)}, {gain:.2f}× as fast as {name(present.blocks)}")


def one_pass_up_to(trials: Sequence[Trial]) -> int:
    """The widest head up to which, at every head dim tried, one pass beats the best that was seen of two."""
    widest = 0
    for head_dim in sorted({trial.head_dim for trial in trials}):
        here = [trial for trial in trials if trial.head_dim == head_dim and trial.time]
        one = [trial.time for trial in here if trial.kernel == "one_pass"]
        two = [trial.time for trial in here if trial.kernel.startswith("grad_")]
        if not one or not two or min(one, key=_median).high >= min(two, key=_median).low:
            break
        widest = head_dim
    return widest


def _median(time: Timing) -> float:
    return time.median


def rewrite(source: str, found: Sequence[Winner], major: int, *, where: str, one_pass: int | None = None) -> str:
    """The table's module with the winners in it, and `one_pass` (None: as it is) in ONE_PASS.

    where: the device and the date. Raises ValueError if the module has no such table for GPUs of compute capability
    `major`.
    """
    for winner in found:
        entry = _entry(source, "_TABLES", winner.kernel, major)
        table = _with_winner(_read(entry), winner)
        source = _replace(source, entry, _format(table, entry.col_offset), f"{where}: {winner.reason}", winner.head_dim)
    if one_pass is not None:
        entry = _entry(source, "ONE_PASS", major)
        source = _splice(source, entry, str(one_pass))
    ast.parse(source)
    return source


def _entry(source: str, table: str, *keys: str | int) -> ast.expr:
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.AnnAssign) and getattr(statement.target, "id", "") == table:
            node: ast.expr | None = statement.value
            for key in keys:
                pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
                node = next((v for k, v in pairs if isinstance(k, ast.Constant) and k.value == key), None)
            if node is not None:
                return node
    raise ValueError(f"the configuration table has no {table}{''.join(f'[{key!r}]' for key in keys)}; write one first")


def _read(entry: ast.expr) -> Table:
    return [
        (ast.literal_eval(pair.elts[0]), BlockSizes(*map(ast.literal_eval, pair.elts[1].args))) for pair in entry.elts
    ]


def _with_winner(table: Table, winner: Winner) -> Table:
    """Every other head dim keeps what it has."""
    rows = [(own, next(blocks for widest, blocks in table if own <= widest)) for own in _ALL_HEAD_DIMS]
    rows = [(own, winner.blocks if own == winner.head_dim else blocks) for own, blocks in rows]
    return [row for row, after in zip(rows, [*rows[1:], (0, None)], strict=True) if row[1] != after[1]]


def _format(table: Table, column: int) -> str:
    """As ruff formats it: in one line if it fits."""
    pairs = [f"({widest}, BlockSizes({b.own}, {b.other}, {b.num_warps}, {b.num_stages}))" for widest, b in table]
    line = f"[{', '.join(pairs)}]"
    if column + len(line) + 1 <= 120:
        return line
    indent = "\n" + " " * 12
    return "[" + "".join(f"{indent}{pair}," for pair in pairs) + "\n" + " " * 8 + "]"


def _replace(source: str, entry: ast.expr, text: str, reason: str, head_dim: int) -> str:
    """`text` in place of the entry, and the reason in a line above it, in place of an earlier one of this head dim."""
    lines = _splice(source, entry, text).split("\n")
    first = start = entry.lineno - 1
    while lines[start - 1].lstrip().startswith("#"):
        start -= 1
    kept = [line for line in lines[start:first] if not (_MARK in line and f" at {head_dim}: " in line)]
    place, _, rest = reason.partition(": ")
    comment = f"{' ' * 8}{_MARK}{place}, at {head_dim}: {rest}."
    return "\n".join([*lines[:start], *kept, comment, *lines[first:]])


def _splice(source: str, entry: ast.expr, text: str) -> str:
    lines = source.split("\n")
    head = lines[entry.lineno - 1].encode()[: entry.col_offset].decode()
    tail = lines[entry.end_lineno - 1].encode()[entry.end_col_offset :].decode()
    return "\n".join([*lines[: entry.lineno - 1], *f"{head}{text}{tail}".split("\n"), *lines[entry.end_lineno :]])


def tune(folder: Path, device: torch.device, timer: Timer, *, dry: bool) -> None:
    """Try everything, then rewrite kernels/_attention_config.py; a dry walk writes into `folder` alone."""
    record, major = environment(), target_arch(device)[0]
    trials = tune_attention(folder, device, timer, small=dry)
    found = list(winners(trials))
    file = ROOT / "kernels" / "_attention_config.py"
    where = f"{record['device']} {record['date'][:10]}"
    text = rewrite(file.read_text(), found, major, where=where, one_pass=one_pass_up_to(trials))
    (folder / file.name).write_text(text)
    if not dry:
        file.write_text(text)
    for winner in found:
        print(f"{winner.kernel} at head dim {winner.head_dim}: {winner.reason}")
    print(f"{len(found)} numbers changed; one pass is taken up to head dim {one_pass_up_to(trials)}")


TUNABLE: Mapping[str, Callable[..., None]] = {"packed_attention": tune}
