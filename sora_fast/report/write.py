"""Results in, report out."""

from collections.abc import Sequence
from pathlib import Path

from sora_fast.files import check_folder, replacing, write_text
from sora_fast.report import markdown, page, tables
from sora_fast.report.compare import labels
from sora_fast.report.figures import all_plots
from sora_fast.report.loops import hot_loops
from sora_fast.report.results import read_result


def write_report(files: Sequence[Path], out: Path, *, loops: Path | None = None) -> list[Path]:
    """Write `out` (.html), the same as Markdown, and a PNG a plot beside it; all that was written, the page first.

    files: JSON of `benchmarks.gpu_suite` or of pytest-benchmark; the second and later ones are compared with the
    first. loops: JSON of `benchmarks.aot`, whose hot loops are shown too: bounds beside what was measured. Raises
    ValueError if a file holds no results, or `out` is not called .html or cannot be written.
    """
    if not files:
        raise ValueError("files is empty; give at least one JSON file of results")
    if out.suffix.lower() != ".html":
        raise ValueError(f"{out}: a report must be called .html")
    if out.is_dir():
        raise ValueError(f"{out}: it is a folder; name a file in it")
    check_folder(out.parent)
    results = [read_result(file) for file in files]
    names = labels(results)
    environment = tables.environment(results, names)
    comparisons = [
        tables.comparison(results[0], result, (names[0], name))
        for result, name in zip(results[1:], names[1:], strict=True)
    ]
    contents = [tables.everything(results, names), *([hot_loops(loops)] if loops else [])]
    missing = tables.not_measured(results, names)
    plots = all_plots(results, names)

    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = [out.with_name(f"{out.stem}-{plot.name}.png") for plot in plots]
    for file, plot in zip(pictures, plots, strict=True):
        with replacing(file) as partial:
            partial.write_bytes(plot.png)
    titled = [(plot.title, file.name) for plot, file in zip(plots, pictures, strict=True)]
    text = out.with_suffix(".md")
    write_text(text, markdown.document(environment, comparisons, titled, contents, missing))
    write_text(out, page.document(environment, comparisons, plots, contents, missing))
    return [out, text, *pictures]
