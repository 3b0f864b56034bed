"""The report as one HTML file that needs nothing else: no network, and without scripts it still shows everything."""

from collections.abc import Sequence
from html import escape

from sora_fast.report.compare import NOISE, NOTHING_IN_COMMON
from sora_fast.report.figures import Plot
from sora_fast.report.tables import Table, text

_STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }
body { margin: 0 auto; padding: 1rem; max-width: 1400px }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem }
p { max-width: 46rem; overflow-wrap: anywhere } li { overflow-wrap: anywhere }
.plots { columns: 2 420px; column-gap: 1.5rem } figure { margin: 0 0 1.5rem; break-inside: avoid }
figure svg { width: 100%; max-width: 520px; height: auto }
figcaption { font-size: .85rem; color: #555 } figcaption b { display: block; color: #1a1a1a; font-size: 1rem }
.scroll { overflow: auto; max-height: 80vh; border: 1px solid #ddd }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #eee; white-space: nowrap }
td.number { text-align: right } tr.marked td { background: #fde8e0 }
.environment td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; min-width: 7rem }
.environment td:first-child { color: #555; min-width: 0; overflow-wrap: normal }
thead th { position: sticky; top: 0; background: #f6f6f6 }
th button { all: unset; cursor: pointer; font-weight: 600 } th button:focus-visible { outline: 2px solid #0072B2 }
th[aria-sort=ascending] button::after { content: " ▲" } th[aria-sort=descending] button::after { content: " ▼" }
input { font: inherit; padding: .3rem .6rem; margin-bottom: .5rem; box-sizing: border-box; width: min(20rem, 100%) }
"""

# A head that is clicked sorts by its column, numbers as numbers and what is not there last; again: the other way.
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.tHead.querySelectorAll("th").forEach((head, column) => head.querySelector("button").onclick = () => {
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    table.tHead.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", {numeric: true}) : a - b);
    };
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  });
}
for (const input of document.querySelectorAll("input[type=search]")) {
  const rows = input.nextElementSibling.querySelectorAll("tbody tr");
  input.oninput = () => {
    const words = input.value.toLowerCase().split(/\\s+/);
    for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  };
}
"""

# Nothing may be fetched, whatever a result's text contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(
    environment: Table,
    comparisons: Sequence[Table],
    plots: Sequence[Plot],
    tables: Sequence[Table],
    missing: list[str],
) -> str:
    """The whole page."""
    parts = [_table(environment, sortable=False)]
    parts += map(_comparison, comparisons)
    parts += ["<h2>Plots</h2>", f'<div class="plots">{"".join(map(_figure, plots))}</div>']
    parts += map(_searched, tables)
    listed = "".join(f"<li>{escape(line)}</li>" for line in missing) or "<li>Nothing is missing.</li>"
    parts += ["<h2>Not measured</h2>", f'<ul id="not-measured">{listed}</ul>']
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>Benchmark report</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Benchmark report</h1>
{body}
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _comparison(content: Table) -> str:
    head = f"<h2>{escape(content.title)}</h2>"
    if not content.rows:
        return f"{head}<p>{NOTHING_IN_COMMON}</p>"
    return f"{head}<p>{escape(_verdict(content))} {NOISE}</p>{_table(content)}"


def _searched(content: Table) -> str:
    search = '<input type="search" placeholder="filter, for example: adaln backward" aria-label="filter the table">'
    note = f"{content.note} Click a column's head to sort by it.".lstrip()
    return f"<h2>{escape(content.title)}</h2><p>{escape(note, quote=False)}</p>{search}{_table(content)}"


def _verdict(comparison: Table) -> str:
    if comparison.marked:
        return f"{len(comparison.marked)} of {len(comparison.rows)} regressed beyond the noise (marked)."
    return f"{len(comparison.rows)} measured in both, none marked as a regression."


def _figure(plot: Plot) -> str:
    svg = plot.svg.replace("<svg ", f'<svg role="img" aria-label="{escape(plot.title)}" ', 1)
    return f"<figure><figcaption><b>{escape(plot.title)}</b>{escape(plot.caption)}</figcaption>{svg}</figure>"


def _table(content: Table, *, sortable: bool = True) -> str:
    heads = (f"<button>{escape(name)}</button>" if sortable else escape(name) for name in content.columns)
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    rows = "".join(
        f"<tr{' class=marked' if place in content.marked else ''}>{''.join(map(_cell, row))}</tr>"
        for place, row in enumerate(content.rows)
    )
    kind = "sortable" if sortable else "environment"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _cell(cell: str | float | int) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    return f'<td class="number" data-value="{cell}">{text(cell)}</td>'
