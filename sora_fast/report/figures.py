"""The plots, drawn once: as SVG inside the page and as PNG beside it.

Figures are narrow (a phone shows them whole, a desk puts them side by side). Marks carry their numbers as tooltips.
"""

import html
import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from sora_fast.report.results import Measurement, Result

WIDTH, BAR, LINE = 4.0, 0.24, 0.17  # inches; LINE: of a legend
# Characters of a name that fit into a legend's column: of two, and of one.
HALF_LINE, WHOLE_LINE = 24, 56
# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKS = "osD^vP*X"
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "svg.fonttype": "none",  # text stays text: it can be searched, and the page stays small
}


@dataclass(frozen=True)
class Plot:
    """A figure with the name of its file and a sentence that says how to read it."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Mark:
    """A measurement as it is drawn. who: the backend and, if there are several results, the result's name.

    A backend has its colour in all results; those after the first are paler, and their lines are dashed.
    """

    measurement: Measurement
    result: Result
    who: str
    colour: str
    later: int  # results before this one

    @property
    def alpha(self) -> float:
        return 0.9 if self.later == 0 else max(0.5 - 0.1 * (self.later - 1), 0.2)

    @property
    def dashes(self) -> str:
        return "--" if self.later else "-"


def all_plots(results: Sequence[Result], names: Sequence[str]) -> list[Plot]:
    """Every plot that the results have the numbers for."""
    backends = dict.fromkeys(m.backend for result in results for m in result.measurements)
    colours = {backend: COLOURS[i % len(COLOURS)] for i, backend in enumerate(backends)}
    marks = [
        Mark(m, result, m.backend if len(results) == 1 else f"{m.backend} · {name}", colours[m.backend], later)
        for later, (result, name) in enumerate(zip(results, names, strict=True))
        for m in result.measurements
    ]
    with matplotlib.rc_context(STYLE):
        return [*_roofline(marks), *_scaling(marks), *_bars(marks)]


class _Canvas:
    """A figure whose marks can have tooltips."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(WIDTH, height), layout="constrained")
        self.axes = self.figure.subplots()
        self.tips: list[str] = []

    def tip(self, artist: Any, text: str) -> None:
        artist.set_gid(f"tip-{len(self.tips)}")
        self.tips.append(text)

    def legend(self, columns: int = 1) -> None:
        """Above the axes, where it hides no mark and takes no height from them; each name once, and whole."""
        handles = dict(zip(*self.axes.get_legend_handles_labels()[::-1], strict=True))
        columns = 1 if any(len(name) > HALF_LINE for name in handles) else columns
        names = [textwrap.fill(name, WHOLE_LINE) for name in handles]
        lines = math.ceil(sum(name.count("\n") + 1 for name in names) / columns)
        self.figure.set_figheight(self.figure.get_figheight() + LINE * max(lines - 2, 0))
        where = {"loc": "outside upper left", "frameon": False, "fontsize": 8, "ncols": columns}
        for text in self.figure.legend(handles.values(), names, **where).get_texts():
            text.set_parse_math(False)

    def plot(self, name: str, title: str, caption: str) -> Plot:
        name = re.sub(r"[^\w-]+", "-", name)
        svg, png = io.StringIO(), io.BytesIO()
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # laid out once, not once a format
        # The salt makes ids that are the same in every run and that no other plot of the page has.
        with matplotlib.rc_context({"svg.hashsalt": name}):
            self.figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        self.figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
        text = svg.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r'<g id="tip-(\d+)">', lambda m: f"<g><title>{html.escape(self.tips[int(m[1])])}</title>", text)
        text = re.sub(r' id="(?:figure|axes|patch|line2d|text|legend|matplotlib)[\w.]*"', "", text)
        return Plot(name, title, caption, text, png.getvalue())


def _tip(mark: Mark) -> str:
    m = mark.measurement
    time = f"{m.time.median:.4g} ms ({m.time.low:.4g} to {m.time.high:.4g}, {m.time.samples} rounds)"
    return ", ".join(filter(None, (case_name(m), mark.who, time, m.rate)))


def case_name(m: Measurement) -> str:
    """op[case], direction."""
    return m.op + (f"[{m.case}]" if m.case else "") + (f", {m.direction}" if m.direction else "")


def _roofline(marks: Sequence[Mark]) -> Iterator[Plot]:
    known = [(mark, least) for mark in marks if (least := mark.measurement.least(mark.result.ceilings))]
    if not known:
        return
    canvas = _Canvas(4.4)
    axes = canvas.axes
    floors = min(least for _, least in known) / 2, max(least for _, least in known) * 2
    axes.loglog(floors, floors, color="black", linewidth=1.2)
    for share in (0.5, 0.1):
        axes.loglog(floors, [floor / share for floor in floors], color="grey", linewidth=0.7, linestyle="--")
        _beside(axes, f"{share:.0%}", floors[1], floors[1] / share, color="grey")
    _beside(axes, "roof", floors[1], floors[1])
    ops = list(dict.fromkeys(mark.measurement.op for mark, _ in known))
    for mark, least in known:
        m = mark.measurement
        shape = MARKS[ops.index(m.op) % len(MARKS)]
        (line,) = axes.plot([least], [m.time.median], shape, color=mark.colour, markersize=5, alpha=mark.alpha)
        canvas.tip(line, f"{_tip(mark)}, {least / m.time.median:.0%} of the ceiling")
    for op in ops:
        axes.plot([], [], MARKS[ops.index(op) % len(MARKS)], color="grey", markersize=5, label=op)
    for mark in {mark.who: mark for mark, _ in known}.values():
        axes.plot([], [], color=mark.colour, alpha=mark.alpha, linewidth=4, label=mark.who)
    axes.set(xlabel="least time that the ceilings allow (ms)", ylabel="measured time (ms)")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    canvas.legend(columns=2)
    yield canvas.plot(
        "roofline",
        "Roofline",
        "Every kernel whose bytes or FLOPs are counted. Across: the time that its work takes at the measured copy "
        "bandwidth or the measured matrix rate, whichever is longer. Up: the time it took. On the line it is at "
        "the roof; dashed lines are at 50% and 10% of it.",
    )


def _scaling(marks: Sequence[Mark]) -> Iterator[Plot]:
    def kind(mark: Mark) -> tuple[str, str, str]:
        return mark.measurement.op, mark.measurement.series, mark.measurement.direction

    known = sorted((mark for mark in marks if mark.measurement.tokens), key=kind)
    for (op, series, direction), group in groupby(known, key=kind):
        curves: dict[str, list[Mark]] = {}
        for mark in group:
            curves.setdefault(mark.who, []).append(mark)
        curves = {who: curve for who, curve in curves.items() if len({m.measurement.tokens for m in curve}) > 1}
        if not curves:
            continue
        canvas = _Canvas(3.4)
        for curve in curves.values():
            _curve(canvas, sorted(curve, key=lambda mark: mark.measurement.tokens))
        canvas.axes.set(xlabel="tokens", ylabel="ns a token", xscale="log", yscale="log")
        _plain_ticks(canvas.axes.xaxis)
        _plain_ticks(canvas.axes.yaxis)
        canvas.legend()
        title = ", ".join(filter(None, (op, series, direction)))
        name = f"scaling-{title}"
        yield canvas.plot(name, f"Cost of a token: {title}", "The band is the first to the ninth decile of the rounds.")


def _curve(canvas: _Canvas, curve: Sequence[Mark]) -> None:
    first, tokens = curve[0], [mark.measurement.tokens for mark in curve]
    low, middle, high = (
        [1e6 * getattr(mark.measurement.time, part) / mark.measurement.tokens for mark in curve]
        for part in ("low", "median", "high")
    )
    canvas.axes.fill_between(tokens, low, high, color=first.colour, alpha=0.2, linewidth=0)
    canvas.axes.plot(tokens, middle, first.dashes, color=first.colour, alpha=first.alpha, linewidth=1, label=first.who)
    for mark, x, y in zip(curve, tokens, middle, strict=True):
        (point,) = canvas.axes.plot([x], [y], "o", color=mark.colour, alpha=mark.alpha, markersize=4)
        canvas.tip(point, f"{x} tokens, {y:.4g} ns a token, {_tip(mark)}")


def _bars(marks: Sequence[Mark]) -> Iterator[Plot]:
    for op in dict.fromkeys(mark.measurement.op for mark in marks):
        groups: dict[str, list[Mark]] = {}
        for mark in marks:
            if mark.measurement.op == op:
                groups.setdefault(case_name(mark.measurement).removeprefix(op).strip(", ") or op, []).append(mark)
        canvas = _Canvas(1.0 + BAR * (sum(map(len, groups.values())) + len(groups)))
        place, longest = 0.0, 1.0
        for name, group in groups.items():
            longest = max(longest, _group_of_bars(canvas, name, group, place))
            place += len(group) + 1
        canvas.axes.set(xlim=(0, 1.3 * longest), ylim=(place - 0.5, -1.1), yticks=[], xlabel="time, fastest = 1")
        canvas.axes.axvline(1, color="grey", linewidth=0.7, linestyle="--", zorder=0)
        canvas.legend(columns=2)
        caption = "Each group is the same work; whiskers: the first to the ninth decile of the rounds."
        yield canvas.plot(f"bars-{op}", op, caption)


def _group_of_bars(canvas: _Canvas, name: str, group: list[Mark], place: float) -> float:
    """Draw the bars of one case from `place` downwards; how far they reach."""
    fastest = min(mark.measurement.time.median for mark in group)
    axes, ends = canvas.axes, []
    _beside(axes, name, 0, place - 0.8, weight="bold")
    backends = list(dict.fromkeys(mark.measurement.backend for mark in group))
    group.sort(key=lambda mark: backends.index(mark.measurement.backend))
    for offset, mark in enumerate(group, start=1):
        time, y = mark.measurement.time, place + offset - 1
        width = time.median / fastest
        whiskers = [[(time.median - time.low) / fastest], [(time.high - time.median) / fastest]]
        (bar,) = axes.barh(y, width, 0.8, color=mark.colour, alpha=mark.alpha, label=mark.who)
        axes.errorbar(width, y, xerr=whiskers, color="black", linewidth=0.8, capsize=2)
        canvas.tip(bar, _tip(mark))
        ends.append(max(width, time.high / fastest))
        _beside(axes, f"{time.median:.3g} ms" if time.median < 1000 else f"{time.median:.0f} ms", ends[-1], y)
    return max(ends)


def _plain_ticks(axis: Axis) -> None:
    """0.5, 1, 2 where a logarithmic axis is short; the default writes 3×10⁰ beside 4×10⁰, one over the other."""
    low, high = axis.get_view_interval()
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_minor_formatter(StrMethodFormatter("{x:g}") if high < 100 * low else NullFormatter())


def _beside(axes: Axes, text: str, x: float, y: float, **options: Any) -> None:
    """A few points to the right: leading spaces would not do it, an SVG drops them."""
    place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    place["parse_math"] = False  # a dollar in a name is a dollar
    axes.annotate(text, (x, y), fontsize=8, **place, **options)
