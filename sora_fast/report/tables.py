"""What stands in the tables, for the page and for Markdown alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from sora_fast.report.compare import compare, is_regression
from sora_fast.report.results import Measurement, Result

Cell = str | float | int
# Notes of a measurement that have a column, where any has them: its name, and the factor to its unit.
NOTES = {
    "peak_bytes": ("peak MiB", 2**-20),
    "joules": ("J a call", 1),
    "sm_mhz": ("SM MHz", 1),
    "throttled_by": ("held back by", 1),
    "error": ("error", 1),
    "useful_tokens_per_second": ("useful tokens/s", 1),
    "padding": ("% padding", 100),
    "kept": ("% of the data", 100),
    "kept_bytes_per_token": ("KiB kept a token", 2**-10),
}
ENVIRONMENT = ("device", "commit", "date", "torch", "triton", "cuda", "python")


@dataclass(frozen=True)
class Table:
    """Columns and rows; numbers are kept as numbers, so that they sort. `marked`: rows that deserve an eye.

    note: what one must know to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    marked: frozenset[int] = frozenset()
    note: str = ""


def text(cell: Cell) -> str:
    """As it is shown."""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def everything(results: Sequence[Result], names: Sequence[str]) -> Table:
    """A row a measurement."""
    columns = ("op", "case", "direction", "backend", "ms", "low", "high", "rounds", "rate", "% of ceiling", "× fastest")
    noted = [note for note in NOTES if any(note in m.notes for result in results for m in result.measurements)]
    columns += tuple(NOTES[note][0] for note in noted)
    rows: list[tuple[Cell, ...]] = []
    for result, name in zip(results, names, strict=True):
        fastest: dict[tuple[str, str, str], float] = {}
        for m in result.measurements:
            fastest[m.group] = min(m.time.median, fastest.get(m.group, m.time.median))
        for m in result.measurements:
            notes = (_note(m, note) for note in noted)
            row = (*_row(m, result), m.time.median / fastest[m.group], *notes)
            rows.append(row if len(results) == 1 else (name, *row))
    return Table("Everything measured", columns if len(results) == 1 else ("result", *columns), tuple(rows))


def _row(m: Measurement, result: Result) -> tuple[Cell, ...]:
    least, time = m.least(result.ceilings), m.time
    share: Cell = 100 * least / time.median if least else ""
    return m.op, m.case, m.direction, m.backend, time.median, time.low, time.high, time.samples, m.rate, share


def _note(m: Measurement, name: str) -> Cell:
    value = m.notes.get(name, "")
    return value if isinstance(value, str) else value * NOTES[name][1]


def comparison(before: Result, after: Result, names: tuple[str, str]) -> Table:
    """What both measured; regressions are marked."""
    changes = compare(before, after)
    rows = tuple(
        (*change.after.key, change.before.time.median, change.after.time.median, change.ratio, change.verdict)
        for change in changes
    )
    marked = frozenset(i for i, change in enumerate(changes) if is_regression(change, before, after))
    columns = ("op", "case", "direction", "backend", "ms before", "ms after", "ratio", "verdict")
    return Table(f"{names[0]} → {names[1]}", columns, rows, marked)


def environment(results: Sequence[Result], names: Sequence[str]) -> Table:
    """What each result was measured with, a column each."""
    fields = dict.fromkeys([*ENVIRONMENT, *(name for result in results for name in result.environment)])
    rows: list[tuple[Cell, ...]] = [("file", *(result.source for result in results))]
    for name in fields:
        values = [result.environment.get(name) for result in results]
        if any(value is not None for value in values):
            rows.append((name, *("" if value is None else str(value) for value in values)))
    if any(result.ceilings for result in results):
        found = [result.ceilings for result in results]
        rows.append(("copy, GB/s", *(f"{ceilings.gigabytes_per_second:.4g}" if ceilings else "" for ceilings in found)))
        rows.append(("product, TFLOP/s", *(f"{ceilings.teraflops:.4g}" if ceilings else "" for ceilings in found)))
    return Table("Environment", ("", *names), tuple(rows))


def not_measured(results: Sequence[Result], names: Sequence[str]) -> list[str]:
    """What a reader may look for in vain, a line each."""
    lines = []
    every = dict.fromkeys(key for result in results for key in result.by_key)
    for result, name in zip(results, names, strict=True):
        found = list(result.missing)
        if result.ceilings is None:
            found.append("the device's ceilings, so there is no roofline and no share of a ceiling")
        elif uncounted := sorted({m.op for m in result.measurements if not m.least(result.ceilings)}):
            found.append(f"bytes or FLOPs of {', '.join(uncounted)}: not on the roofline")
        if len({m.tokens for m in result.measurements} - {0}) < 2:
            found.append("one op at several token counts, so there are no scaling curves")
        if few := sum(m.time.samples < 3 for m in result.measurements):
            found.append(f"the noise of {few} measurements of fewer than three rounds")
        alone = [group for group, count in _backends(result).items() if count == 1]
        if alone:
            ops = ", ".join(dict.fromkeys(op for op, _, _ in alone))
            found.append(f"a peer beside {len(alone)} cases of {ops}")
        absent = [key for key in every if key not in result.by_key]
        if absent:
            ops = ", ".join(dict.fromkeys(key[0] for key in absent))
            found.append(f"{len(absent)} measurements that another result has, of {ops}")
        lines += found if len(results) == 1 else [f"{name}: {line}" for line in found]
    return lines


def _backends(result: Result) -> dict[tuple[str, str, str], int]:
    counts: dict[tuple[str, str, str], int] = {}
    for m in result.measurements:
        counts[m.group] = counts.get(m.group, 0) + 1
    return counts
