"""The report as Markdown, for a README or a pull request; the plots are files beside it."""

from collections.abc import Sequence

from sora_fast.report.compare import NOISE, NOTHING_IN_COMMON
from sora_fast.report.tables import Table, text


def table(content: Table) -> str:
    """A table; marked rows are bold."""
    lines = [content.columns, tuple("---" for _ in content.columns)]
    for place, row in enumerate(content.rows):
        cells = tuple(text(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
        lines.append(tuple(f"**{cell}**" if cell else "" for cell in cells) if place in content.marked else cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document(
    environment: Table,
    comparisons: Sequence[Table],
    plots: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    missing: list[str],
) -> str:
    """Everything; plots: (title, file)."""
    parts = ["# Benchmark report", table(environment)]
    for content in comparisons:
        parts += [f"## {content.title}", *([NOISE, table(content)] if content.rows else [NOTHING_IN_COMMON])]
    parts += [f"![{title}]({file})" for title, file in plots]
    for content in tables:
        parts += [f"## {content.title}", *([content.note] if content.note else []), table(content)]
    parts.append("## Not measured")
    parts.append("\n".join(f"- {line}" for line in missing) or "Nothing is missing.")
    return "\n\n".join(parts) + "\n"
