"""Is a difference one? Two results side by side, against the noise of their own rounds."""

from dataclasses import dataclass

from sora_fast.report.results import Measurement, Result

# Below this many rounds a spread says nothing about the noise.
ROUNDS = 3

NOTHING_IN_COMMON = "Nothing was measured in both."
NOISE = (
    "A change counts only if the two spreads (first to ninth decile of the rounds) do not overlap and both have at "
    f"least {ROUNDS} rounds. What differs between runs and not within one (clocks, temperature, other work) is not in "
    "that spread: repeat a run before you believe a small change."
)


@dataclass(frozen=True)
class Change:
    """The same work in two results. ratio: time after over time before."""

    before: Measurement
    after: Measurement
    verdict: str  # "slower", "faster", "within the noise", "too few rounds"

    @property
    def ratio(self) -> float:
        return self.after.time.median / self.before.time.median


def compare(before: Result, after: Result) -> list[Change]:
    """What both measured, the largest slow-down first."""
    pairs = [(before.by_key[key], measurement) for key, measurement in after.by_key.items() if key in before.by_key]
    changes = [Change(old, new, _verdict(old, new)) for old, new in pairs]
    return sorted(changes, key=lambda change: -change.ratio)


def is_regression(change: Change, before: Result, after: Result) -> bool:
    """Slower beyond the noise on the same device; another device may be slower."""
    return change.verdict == "slower" and before.device == after.device


def _verdict(before: Measurement, after: Measurement) -> str:
    old, new = before.time, after.time
    if min(old.samples, new.samples) < ROUNDS:
        return "too few rounds"
    if new.low > old.high:
        return "slower"
    return "faster" if new.high < old.low else "within the noise"


def labels(results: list[Result]) -> list[str]:
    """A short name each: by what tells them apart, device or commit, else the file."""
    names = [f"{result.device}, {result.commit[:7]}" for result in results]
    if len({result.device for result in results}) == 1 and len(results) > 1:
        names = [result.commit[:7] + ("+changes" if "+" in result.commit else "") for result in results]
    if len(set(names)) < len(names):
        names = [f"{name} ({result.source})" for name, result in zip(names, results, strict=True)]
    return names
