"""When the phases of the GPU suite end."""

from collections.abc import Mapping, Sequence

# The phases in their order, and the seconds of nine minutes that each may take. The proof on a small pack comes first
# and is worth the most; what tests there is time for, and the sanitizer, come last.
SECONDS: Mapping[str, float] = {
    "versions": 20,
    "build": 25,
    "smoke": 60,
    "headline": 115,
    "tuning": 95,
    "model": 125,
    "again": 30,
    "tests": 35,
    "sanitizer": 25,
}
# Kept for the end: to end processes and to write.
RESERVE = 10


def ends(phases: Sequence[str], seconds: float) -> dict[str, float]:
    """Seconds from the start at which each of `phases` must have ended, where all have `seconds`: each has its share,
    and what an earlier one leaves over."""
    total, end = sum(SECONDS[phase] for phase in phases) + RESERVE, 0.0
    found = {}
    for phase in phases:
        end += SECONDS[phase]
        found[phase] = seconds * end / total
    return found
