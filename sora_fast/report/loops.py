"""What the kernels' hot loops cost, as `benchmarks.aot` read it from their machine code."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sora_fast.report.tables import Cell, Table

_COLUMNS = ("kernel", "target", "loop", "products", "binding", "bound, %", "alone, %", "× asked")
_COLUMNS += ("instructions/MFLOP", "waits", "barriers")
_NOTE = (
    "Bounds, not measured: the share of the peak rate that the busiest pipe leaves if all of them work at once without "
    "a gap, and the share that one warpgroup reaches with a multiprocessor to itself (Triton {}). "
    "× asked: how often the matrix instructions do what the source asks for; over 1 where warps repeat each other."
)


def hot_loops(file: Path) -> Table:
    """Loops with matrix products, a row each. Raises ValueError, which names the file, if it holds none; OSError."""
    try:
        content = json.loads(file.read_text())
        rows = tuple(_row(row, place, loop) for row, place, loop in _loops(content))
        note = _NOTE.format(content["triton"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not as benchmarks.aot writes it: {type(error).__name__}: {error}") from error
    if not rows:
        raise ValueError(f"{file} holds no hot loops; `python -m benchmarks.aot --update` reads them")
    return Table("Hot loops", _COLUMNS, rows, note=note)


def _loops(content: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], int, Mapping[str, Any]]]:
    for row in content["rows"]:
        for place, loop in enumerate(row.get("loops") or (), 1):
            if loop["products"]:
                yield row, place, loop


def _row(row: Mapping[str, Any], place: int, loop: Mapping[str, Any]) -> tuple[Cell, ...]:
    products = " ".join(f"{count}×{shape}" for shape, count in loop["products"].items())
    shares = ("" if share is None else 100 * share for share in (loop["bound"], loop["alone"]))
    work = loop["instructions"] * loop["warps"] / loop["flops"] * 1e6 if loop["flops"] else ""
    known = (row["kernel"], row["target"], place, products, loop["binding"] or "not modelled")
    done = "" if loop["done"] is None else loop["done"]
    return *known, *shares, done, work, loop["waits"], loop["barriers"]
