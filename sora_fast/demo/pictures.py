"""Pictures of a run: many clips on one sheet, and the loss over time."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sora_fast.media import to_pixels

PAPER, INK, PALE, GIVEN = "#ffffff", "#222222", "#888888", "#1f77b4"
GAP = 4  # pixels between frames
MARGIN = 16
FONT, FONT_SIZE = "DejaVu Sans", 14  # matplotlib carries it, and it has more signs than Pillow's own
SMOOTHING_SHARE = 0.02  # of a run, over which the bold line of the loss curve averages


@dataclass(frozen=True, eq=False)
class Strip:
    """One row of a sheet: a (C, T, H, W) video in [-1, 1], its caption, and how many frames at its ends were given."""

    caption: str
    video: Tensor
    head: int = 0
    tail: int = 0


def contact_sheet(strips: Sequence[Strip], path: str | PathLike[str], *, columns: int = 8, scale: int = 4) -> Path:
    """Draws a PNG with a clip a row: caption, then up to `columns` frames evenly spread from the first to the last.

    Frames are scaled up by the whole number `scale` and numbered; those that the model was given have a blue frame.
    """
    if not strips:
        raise ValueError("strips must not be empty")
    if columns < 2 or scale < 1:
        raise ValueError(f"columns must be at least 2 and scale at least 1, got {columns} and {scale}")
    font = ImageFont.truetype(findfont(FONT), FONT_SIZE)
    rows = [_draw_strip(strip, columns, scale, font) for strip in strips]
    sheet = Image.new(
        "RGB", (max(row.width for row in rows) + 2 * MARGIN, sum(row.height + MARGIN for row in rows) + MARGIN), PAPER
    )
    top = MARGIN
    for row in rows:
        sheet.paste(row, (MARGIN, top))
        top += row.height + MARGIN
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


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
    axes.plot(steps, values, color=PALE, linewidth=0.5, marker=".", markersize=1, alpha=0.6, label="each step")
    axes.plot(steps, _smooth(values), color=GIVEN, linewidth=2, label="smoothed")
    axes.set(xlabel="step", ylabel="loss", yscale="log" if np.nanmin(values, initial=np.inf) > 0 else "linear")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    if seconds is not None:
        _mark_minutes(axes, steps, np.asarray(seconds, dtype=float) / 60)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw_strip(strip: Strip, columns: int, scale: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    pixels = to_pixels(strip.video).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width = pixels.shape[:3]
    shown = np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int))
    line = FONT_SIZE + GAP
    measure = int(np.ceil(font.getlength(strip.caption)))
    row = Image.new("RGB", (max(measure, len(shown) * (width + 2 * GAP)), height + 2 * line + 2 * GAP), PAPER)
    draw = ImageDraw.Draw(row)
    draw.text((GAP, 0), strip.caption, fill=INK, font=font)
    for place, index in enumerate(shown):
        left, top = GAP + place * (width + 2 * GAP), line + GAP
        given = index < strip.head or index >= count - strip.tail
        if given:
            draw.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), fill=GIVEN)
        row.paste(Image.fromarray(pixels[index].squeeze(-1) if pixels.shape[-1] == 1 else pixels[index]), (left, top))
        draw.text((left, top + height + GAP), str(index), fill=GIVEN if given else PALE, font=font)
    return row


def _mark_minutes(axes: Axes, steps: Sequence[int], minutes: np.ndarray) -> None:
    marks = MaxNLocator(8).tick_values(0, minutes[-1])
    marks = marks[(minutes[0] <= marks) & (marks <= minutes[-1])]
    above = axes.secondary_xaxis("top")
    above.set_xticks(np.interp(marks, minutes, steps), [f"{mark:g}" for mark in marks])
    above.set_xlabel("minutes")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window, that ignores gaps."""
    half = max(1, round(len(values) * SMOOTHING_SHARE / 2))
    sums = np.cumsum(np.concatenate([[0], np.nan_to_num(values)]))
    counts = np.cumsum(np.concatenate([[0], np.isfinite(values)]))
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    present = counts[high] - counts[low]
    return np.where(present > 0, (sums[high] - sums[low]) / np.maximum(present, 1), np.nan)
