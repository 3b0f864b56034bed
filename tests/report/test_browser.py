"""The page in a real browser, at the width of a desk and of a phone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

COLUMN = """
[...document.querySelectorAll("table.sortable:last-of-type")].at(-1).querySelectorAll("tbody tr:not([hidden])")
"""
CLICK = "[...document.querySelectorAll('th button')].filter(b => b.textContent === {name!r}).at(-1).click()"
CELLS = "[..." + COLUMN.strip() + "].map(row => row.cells[{place}].textContent)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.mark.parametrize("width", [1280, 375])
def test_it_loads_whole_and_fits(browser: Browser, two_commits: Path, width: int) -> None:
    browser.requests.clear()
    browser.open(two_commits, width=width)
    assert browser.errors == []
    assert browser.requests == [two_commits.as_uri()], "nothing else is asked for"
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    boxes = browser.evaluate(
        "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect()).map(b => [b.width, b.height])"
    )
    assert len(boxes) == 5
    assert all(min(300, width) <= wide <= width and high > 150 for wide, high in boxes)
    letters = browser.evaluate(
        "Math.min(...[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height))"
    )
    assert letters >= 8, "the smallest text of the plots can be read"
    assert browser.evaluate("document.querySelectorAll('figure svg title').length") > 50


def test_text_of_plots_does_not_leave_them(browser: Browser, two_commits: Path) -> None:
    browser.open(two_commits, width=375)
    outside = browser.evaluate("""
        [...document.querySelectorAll("figure svg")].flatMap(svg => {
          const edge = svg.getBoundingClientRect();
          return [...svg.querySelectorAll("text")].filter(t => t.getBoundingClientRect().right > edge.right + 1)
            .map(t => t.textContent);
        })
    """)
    assert outside == []


def test_a_click_sorts(browser: Browser, two_commits: Path) -> None:
    browser.open(two_commits, width=1280)
    place = 5  # ms
    shown = [float(cell) for cell in browser.evaluate(CELLS.format(place=place))]
    assert shown != sorted(shown)
    for order in (sorted(shown), sorted(shown, reverse=True)):
        browser.evaluate(CLICK.format(name="ms"))
        assert [float(cell) for cell in browser.evaluate(CELLS.format(place=place))] == order
    browser.evaluate(CLICK.format(name="backend"))
    names = browser.evaluate(CELLS.format(place=4))
    assert names == sorted(names) and browser.errors == []


def test_typing_filters(browser: Browser, two_commits: Path) -> None:
    browser.open(two_commits, width=1280)
    browser.evaluate(
        "(i => { i.value = 'ADALN backward'; i.dispatchEvent(new Event('input')) })"
        "(document.querySelector('input[type=search]'))"
    )
    ops, directions = (set(browser.evaluate(CELLS.format(place=place))) for place in (1, 3))
    assert (ops, directions) == ({"adaln"}, {"backward"})
