from itertools import pairwise

import matplotlib
import pytest
from matplotlib.transforms import Bbox

from sora_fast.report.figures import STYLE, _Canvas, _plain_ticks


@pytest.fixture(autouse=True)
def _style() -> None:
    with matplotlib.rc_context(STYLE):
        yield


@pytest.mark.parametrize("name", ["torch", "long, window, SDPA dense mask-forward and backward · 449f683+changes"])
@pytest.mark.parametrize("entries", [3, 12])
def test_a_legend_is_whole_and_takes_no_height_from_the_marks(name: str, entries: int) -> None:
    canvas = _Canvas(3.0)
    for number in range(entries):
        canvas.axes.barh(number, 1.0, label=f"{number} {name}")
    canvas.legend(columns=2)
    canvas.figure.draw_without_rendering()
    (legend,) = canvas.figure.legends
    inside: Bbox = canvas.figure.bbox
    for text in legend.get_texts():
        box = text.get_window_extent()
        assert box.x1 <= inside.x1
        assert box.y1 <= inside.y1
    inches = canvas.axes.get_window_extent().height / canvas.figure.dpi
    assert 2.0 < inches < 3.0


@pytest.mark.parametrize("limits", [(0.28, 2.8), (2.1, 8.0), (0.01, 500.0)])
def test_numbers_of_a_logarithmic_axis_do_not_touch(limits: tuple[float, float]) -> None:
    canvas = _Canvas(3.0)
    canvas.axes.loglog(limits, limits)
    canvas.axes.set_xlim(limits)
    _plain_ticks(canvas.axes.xaxis)
    canvas.figure.draw_without_rendering()
    axis = canvas.axes.xaxis
    ticks = [t for t in [*axis.get_major_ticks(), *axis.get_minor_ticks()] if limits[0] <= t.get_loc() <= limits[1]]
    shown = sorted((t.label1.get_window_extent() for t in ticks if t.label1.get_text()), key=lambda box: box.x0)
    assert len(shown) >= 2
    assert all(left.x1 < right.x0 for left, right in pairwise(shown))
