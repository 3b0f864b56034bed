"""What was measured, read from the JSON of `benchmarks.gpu_suite` or of `pytest benchmarks/ --benchmark-json`.

A benchmark under pytest tells through its `extra_info` what the suite's rows tell by themselves; every key is
optional: op, case, direction, backend (who did the work: "torch", "triton", a peer), bytes_moved and flops (the least
that any implementation must do), tokens and series (measurements of one series differ in their tokens alone),
ceilings ({"gigabytes_per_second", "teraflops"}), absent ({peer: why it did not run}; a suite has it once, beside its
rows). Whatever else it holds that is one number or text is kept as a note.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

Key = tuple[str, str, str, str]

# What `extra_info` says about the measurement itself.
_KNOWN = ("op", "case", "direction", "backend", "bytes_moved", "flops", "tokens", "series", "ceilings", "absent")


def _check_positive(*numbers: float) -> None:
    for number in numbers:
        if not 0 < number < math.inf:
            raise ValueError(f"{number} is not a positive number")


@dataclass(frozen=True)
class Spread:
    """Milliseconds of one call: the median, and the first and the ninth decile, of `samples` rounds."""

    median: float
    low: float
    high: float
    samples: int

    def __post_init__(self) -> None:
        _check_positive(self.median, self.low, self.high, self.samples)

    @staticmethod
    def of(milliseconds: Sequence[float]) -> "Spread":
        ordered = sorted(milliseconds)
        last = len(ordered) - 1
        return Spread(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best: a copy, and one large matrix product."""

    gigabytes_per_second: float
    teraflops: float

    def __post_init__(self) -> None:
        _check_positive(self.gigabytes_per_second, self.teraflops)


@dataclass(frozen=True)
class Measurement:
    """One backend at one case of an op. Zeros: not known, or not what limits the op."""

    op: str
    case: str
    direction: str
    backend: str
    time: Spread
    bytes_moved: int = 0
    flops: int = 0
    tokens: int = 0
    series: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> tuple[str, str, str]:
        """Shared by those who did the same work."""
        return self.op, self.case, self.direction

    @property
    def key(self) -> Key:
        return (*self.group, self.backend)

    @property
    def rate(self) -> str:
        """As one reads it: TFLOP/s or GB/s."""
        if self.flops:
            return f"{self.flops / self.time.median / 1e9:.3g} TFLOP/s"
        return f"{self.bytes_moved / self.time.median / 1e6:.4g} GB/s" if self.bytes_moved else ""

    def least(self, ceilings: Ceilings | None) -> float:
        """Milliseconds that the work takes at the ceilings; 0 if that is not known."""
        if ceilings is None:
            return 0.0
        return max(
            self.bytes_moved / ceilings.gigabytes_per_second / 1e6,
            self.flops / ceilings.teraflops / 1e9,
        )


@dataclass(frozen=True)
class Result:
    """One file: what ran where, and what did not run (a line each)."""

    source: str
    environment: Mapping[str, Any]
    ceilings: Ceilings | None
    measurements: tuple[Measurement, ...]
    missing: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        return str(self.environment.get("device") or "unknown device")

    @property
    def commit(self) -> str:
        return str(self.environment.get("commit") or "unknown commit")

    @cached_property
    def by_key(self) -> dict[Key, Measurement]:
        return {measurement.key: measurement for measurement in self.measurements}


def read_result(file: Path) -> Result:
    """Either form. Raises ValueError, which names the file, if it is neither or holds no measurement; OSError too."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:  # UnicodeDecodeError is one too
        raise ValueError(f"{file} is not JSON: {error}") from error
    read = next((read for name, read in _FORMS.items() if isinstance(content, dict) and name in content), None)
    if read is None:
        raise ValueError(
            f"{file} holds no results: it must come from `python -m benchmarks.gpu_suite` (suite.json) or from "
            "`pytest benchmarks/ --benchmark-json FILE`"
        )
    try:
        result = read(file, content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is not as the benchmarks write it: {type(error).__name__}: {error}") from error
    if not result.measurements:
        raise ValueError(f"{file} holds no measurement: {'; '.join(result.missing[:3]) or 'nothing ran'}")
    return result


def _from_suite(file: Path, content: Mapping[str, Any]) -> Result:
    rows = content["rows"]
    missing = [f"{_name(row)}: {row['failure'].splitlines()[0]}" for row in rows if row.get("failure")]
    missing += _absent(content)
    missing += [
        f"{one['name']}: {one['status']}: {one['reason']}"
        for one in content.get("smoke", ())
        if one["status"] != "PASS"
    ]
    missing += [
        f"not reached of the {phase}: {', '.join(names)}" for phase, names in content.get("unreached", {}).items()
    ]
    for name, counts in content["tests"].items():
        if counts["failed"]:
            missing.append(f"{name}: {counts['failed']} tests failed")
        if not counts.get("complete", True):
            missing.append(f"{name}: not all of its tests were run")
    if content.get("stopped"):
        missing.append(f"what comes after the suite was stopped: {content['stopped']}")
    measurements = [
        Measurement(
            row["op"],
            row["case"],
            row["direction"],
            backend,
            Spread(**time),
            row.get("bytes_moved", 0),
            row.get("flops", 0),
            row.get("tokens", 0),
            row.get("series", ""),
            {**_errors(row, backend), **row.get("notes", {}).get(backend, {})},
        )
        for row in rows
        for backend, time in row["times"].items()
    ]
    ceilings = Ceilings(**content["ceilings"]) if content.get("ceilings") else None
    return Result(str(file), content["environment"], ceilings, tuple(measurements), tuple(missing))


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['op']}[{row['case']}], {row['direction']}"


def _errors(row: Mapping[str, Any], backend: str) -> dict[str, float]:
    errors = row.get("errors", {}).get(backend)
    return {"error": max(errors)} if errors else {}


def _from_pytest(file: Path, content: Mapping[str, Any]) -> Result:
    machine, commit = content.get("machine_info", {}), content.get("commit_info", {})
    environment = {
        "device": machine.get("device") or machine.get("cpu", {}).get("brand_raw") or machine.get("machine"),
        "commit": f"{commit.get('id', 'unknown')}{'+changes' if commit.get('dirty') else ''}",
        "date": content.get("datetime"),
        "python": machine.get("python_version"),
        **{name: machine[name] for name in ("torch", "triton", "cuda", "system", "release") if machine.get(name)},
    }
    measurements, missing, ceilings = [], [], None
    for benchmark in content["benchmarks"]:
        extra = benchmark.get("extra_info") or {}
        ceilings = Ceilings(**extra["ceilings"]) if extra.get("ceilings") else ceilings
        missing += _absent(extra)
        if benchmark.get("has_error") or not benchmark.get("stats"):
            missing.append(f"{benchmark['fullname']}: it failed")
        else:
            measurements.append(_benchmark(benchmark, extra))
    return Result(str(file), environment, ceilings, tuple(measurements), tuple(dict.fromkeys(missing)))


def _absent(content: Mapping[str, Any]) -> list[str]:
    return [f"{peer}: {reason}" for peer, reason in content.get("absent", {}).items()]


def _benchmark(benchmark: Mapping[str, Any], extra: Mapping[str, Any]) -> Measurement:
    module = Path(benchmark["fullname"].split("::")[0]).stem.removeprefix("test_")
    function = benchmark["name"].split("[")[0].removeprefix("test_")
    stats = benchmark["stats"]
    # Times without the single rounds (--benchmark-save without its data) have quartiles in place of deciles.
    time = (
        Spread.of([1e3 * seconds for seconds in stats["data"]])
        if stats.get("data")
        else Spread(1e3 * stats["median"], 1e3 * stats["q1"], 1e3 * stats["q3"], stats["rounds"])
    )
    return Measurement(
        extra.get("op", module),
        extra.get("case", "" if function == module else function),
        extra.get("direction", ""),
        extra.get("backend", benchmark.get("param") or function),
        time,
        extra.get("bytes_moved", 0),
        extra.get("flops", 0),
        extra.get("tokens", 0),
        extra.get("series", ""),
        dict(_notes(extra)),
    )


def _notes(extra: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in extra.items():
        if name not in _KNOWN and isinstance(value, int | float | str):
            yield name, value


_FORMS = {"rows": _from_suite, "benchmarks": _from_pytest}
