"""What the GPU suite says in the terminal: short, and the table comes last."""

from collections.abc import Iterator

from benchmarks.rows import absent, table
from benchmarks.smoke import CRASH, FAIL, OPEN, PASS
from benchmarks.suite import OUT_OF_TIME, Suite, is_wrong
from benchmarks.tune import name, winners
from sora_fast.ops._records import BY_TESTS


def summary(suite: Suite) -> str:
    """All of it."""
    parts = (_smoke(suite), _tests(suite), _validated(suite), _tuned(suite), _missing(suite))
    best = suite.ceilings
    ceilings = f"at best: {best.gigabytes_per_second:.0f} GB/s copied, {best.teraflops:.1f} TFLOP/s"
    lines = ["", *(line for part in parts for line in part), ceilings]
    return "\n".join([*lines, "", table(suite.compared, suite.ceilings)])


def _smoke(suite: Suite) -> Iterator[str]:
    for op in dict.fromkeys(smoke.op for smoke in suite.smoke.values()):
        statuses = [smoke.status for smoke in suite.smoke.values() if smoke.op == op]
        counts = (f"{statuses.count(status)} {status}" for status in (CRASH, FAIL, PASS, OPEN) if status in statuses)
        yield f"smoke: {op}: {', '.join(counts)}"
    for smoke in suite.smoke.values():
        if smoke.status != PASS:
            yield f"  {smoke}"[:400]


def _tests(suite: Suite) -> Iterator[str]:
    failures = ", ".join(name for name, counts in suite.tests.items() if counts.failed)
    passed = sum(counts.passed for counts in suite.tests.values())
    yield f"tests: {passed} passed; failures in: {failures or 'none'}"
    yield f"sanitizer: {suite.sanitizer['errors']} errors ({suite.sanitizer['note']})"


def _validated(suite: Suite) -> Iterator[str]:
    records = suite.validated()
    yield f"validated: {', '.join(dict.fromkeys(record.op for record in records)) or 'none'}"
    if short := ", ".join(dict.fromkeys(record.op for record in records if record.checked != BY_TESTS)):
        yield f"  by smoke and timed cases alone, without all tests: {short}"
    for row in filter(is_wrong, suite.compared):
        yield f"WRONG: {row.op}[{row.case}], {row.direction}: {row.failure or row.errors}"[:400]


def _tuned(suite: Suite) -> Iterator[str]:
    if suite.trials:
        found = list(winners(suite.trials))
        yield f"tuned: {len(suite.trials)} trials, {len(found)} numbers change"
        for winner in found:
            yield f"  {winner.name}: {name(winner.blocks)}, {winner.reason}"


def _missing(suite: Suite) -> Iterator[str]:
    for peer, reason in absent(suite.compared):
        yield f"absent: {peer}: {reason.splitlines()[0][:100]}"
    late = [f"{row.op}[{row.case}]" for row in suite.rows if row.failure == OUT_OF_TIME]
    for phase, names in {"timings": late, **suite.unreached}.items():
        if names:
            yield f"not reached of the {phase}: {', '.join(names)}"[:600]
    if suite.stopped:
        yield f"stopped: {suite.stopped}"
