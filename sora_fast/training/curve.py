"""The loss over a run, as a picture."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

RAW, SMOOTHED = "#888888", "#1f77b4"
# Labels of minutes in the width of the picture: so many do not overlap, and fewer tell little.
MOST_MARKS, FEWEST_MARKS = 12, 4
SMOOTHING_SHARE = 0.02  # of a run, over which the bold line averages


def loss_curve(
    losses: Sequence[float],
    path: str | PathLike[str],
    *,
    steps: Sequence[int] | None = None,
    seconds: Sequence[float] | None = None,
) -> Path:
    """Draws a PNG of the loss over the steps, raw and smoothed.

    Args:
        losses: one a record; a NaN or infinite one leaves a gap.
        steps: the step of each record; None counts from 1.
        seconds: since the start, at each record: a second axis above shows minutes.
    """
    steps = range(1, len(losses) + 1) if steps is None else steps
    if not losses or len(steps) != len(losses) or (seconds is not None and len(seconds) != len(losses)):
        raise ValueError(
            f"losses must not be empty, and steps and seconds must match; got {len(losses)} losses, "
            f"{len(steps)} steps, {'no' if seconds is None else len(seconds)} seconds"
        )
    values = np.where(np.isfinite(losses), np.asarray(losses, dtype=float), np.nan)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color=RAW, linewidth=0.5, marker=".", markersize=1, alpha=0.6, label="each step")
    axes.plot(steps, _smooth(values), color=SMOOTHED, linewidth=2, label="smoothed")
    axes.set(xlabel="step", ylabel="loss", yscale="log" if np.nanmin(values, initial=np.inf) > 0 else "linear")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    if seconds is not None:
        _mark_minutes(axes, steps, np.asarray(seconds, dtype=float) / 60)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _mark_minutes(axes: Axes, steps: Sequence[int], minutes: np.ndarray) -> None:
    marks = _apart(steps, minutes)
    above = axes.secondary_xaxis("top")
    above.set_xticks(np.interp(marks, minutes, steps), [f"{mark:g}" for mark in marks])
    above.set_xlabel("minutes")


def _apart(steps: Sequence[int], minutes: np.ndarray) -> list[float]:
    """Round minutes whose labels do not overlap. Where a run paused, many lie at one step; finer ones are looked at
    then, so that some lie elsewhere."""
    least = (steps[-1] - steps[0]) / MOST_MARKS
    kept: list[float] = []
    for bins in (8, 32, 128, 512):
        kept, last = [], -np.inf
        marks = MaxNLocator(bins).tick_values(0, minutes[-1])
        for mark in marks[(minutes[0] <= marks) & (marks <= minutes[-1])]:
            place = np.interp(mark, minutes, steps)
            if place - last >= least:
                kept, last = [*kept, mark], place
        if len(kept) >= FEWEST_MARKS:
            break
    return kept


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window, that ignores gaps."""
    half = max(1, round(len(values) * SMOOTHING_SHARE / 2))
    sums = np.cumsum(np.concatenate([[0], np.nan_to_num(values)]))
    counts = np.cumsum(np.concatenate([[0], np.isfinite(values)]))
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    present = counts[high] - counts[low]
    return np.where(present > 0, (sums[high] - sums[low]) / np.maximum(present, 1), np.nan)
