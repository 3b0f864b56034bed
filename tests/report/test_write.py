"""The page, the Markdown and the pictures: complete, self-contained, and with no figure of their own."""

import os
import re
from pathlib import Path

import pytest

from sora_fast.cli import main
from sora_fast.report import write_report
from tests.report.made_up import pytest_benchmark, save, suite


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of one result."""
    folder = tmp_path_factory.mktemp("single")
    write_report([save(suite(), folder / "suite.json")], folder / "deep" / "report.html")
    return folder / "deep" / "report.html"


def test_everything_is_written_beside_the_page(single: Path) -> None:
    assert sorted(file.name for file in single.parent.iterdir()) == [
        "report-bars-adaln.png",
        "report-bars-packed_attention.png",
        "report-roofline.png",
        "report-scaling-packed_attention-full-D128-backward.png",
        "report-scaling-packed_attention-full-D128-forward.png",
        "report.html",
        "report.md",
    ]
    text = single.with_suffix(".md").read_text()
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(linked) == 5
    assert all((single.parent / name).read_bytes().startswith(b"\x89PNG") for name in linked)
    assert "| adaln | C1152 | forward | triton | 0.04152 | 0.04069 | 0.04235 | 50 | 3636 GB/s | 90.91 | 1 |" in text
    assert "- segment_mean[C1152], both: not run: out of time" in text


def test_the_page_needs_nothing_else(single: Path) -> None:
    page = single.read_text()
    assert not re.search(r'(?:src|href)="(?!#)', page), "links and sources lead nowhere but into the page"
    assert "Content-Security-Policy" in page
    assert len(page) < 300_000


def test_every_kernel_is_on_the_roofline(single: Path) -> None:
    roofline = single.read_text().split("<b>Roofline</b>")[1].split("</svg>")[0]
    assert roofline.count("of the ceiling</title>") == 2 * (2 * 3 + 3 * 2)
    assert "adaln[C1152], forward, triton, 0.04152 ms" in roofline


def test_results_with_nothing_in_common_make_no_empty_table(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report([save(suite(), tmp_path / "suite.json"), save(pytest_benchmark(), tmp_path / "bench.json")], out)
    for text in (out.read_text(), out.with_suffix(".md").read_text()):
        assert text.count("Nothing was measured in both.") == 1
        assert "verdict" not in text


def test_what_lacks_is_said(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report([save(pytest_benchmark(), tmp_path / "bench.json")], out)
    page = out.read_text()
    listed = page.split('<ul id="not-measured">')[1].split("</ul>")[0]
    assert "no roofline" in listed and "no scaling curves" in listed and "a peer beside 1 case" in listed
    assert "<b>Roofline</b>" not in page


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    odd = "<script>alert(1)</script> $x_{2$ a|b"
    file = save(pytest_benchmark(op="../up", case=odd, backend=odd), tmp_path / "bench.json")
    files = write_report([file], tmp_path / "report.html")
    assert all(file.parent == tmp_path for file in files)
    page = (tmp_path / "report.html").read_text()
    assert "alert(1)" in page and "<script>alert" not in page
    assert r"$x_{2$ a\|b" in (tmp_path / "report.md").read_text()


def test_two_commits(two_commits: Path) -> None:
    page = two_commits.read_text()
    assert page.count("<tr class=marked>") == 2 and "2 of 24 regressed beyond the noise" in page
    assert page.index("1.2</td>") > page.index("aaaaaaa → bbbbbbb")
    assert "| **adaln** | **C1152** | **backward** | **triton** |" in two_commits.with_suffix(".md").read_text()


def test_two_devices(tmp_path: Path) -> None:
    files = [save(suite(), tmp_path / "one.json"), save(suite(device="Other", slower=2), tmp_path / "other.json")]
    write_report(files, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Some GPU, aaaaaaa → Other, aaaaaaa" in page and "class=marked" not in page


def test_the_same_results_give_the_same_files(tmp_path: Path, single: Path) -> None:
    source = single.parent.parent / "suite.json"
    write_report([source], tmp_path / "report.html")
    for file in single.parent.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = save(pytest_benchmark(), tmp_path / "bench.json"), tmp_path / "out.html"
    assert main(["report", str(file), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(out)
    assert out.exists()


@pytest.mark.parametrize("out", ["a/folder.html", "file/new.html", "/proc/new.html"])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    (tmp_path / "a" / "folder.html").mkdir(parents=True)
    (tmp_path / "file").touch()
    assert main(["report", str(tmp_path / "absent.json"), "--out", str(tmp_path / out)]) == 2
    assert re.search("it is a folder|nothing can be written to", capsys.readouterr().err)


def test_names_of_any_bytes_and_capitals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file's name stands in the report, and in what is printed."""
    file = save(suite(), tmp_path / os.fsdecode(b"caf\xe9.json"))
    other = save(suite(commit="b" * 40), tmp_path / "b.json")
    assert main(["report", str(file), str(other), "--out", str(tmp_path / os.fsdecode(b"\xe9.HTML"))]) == 0
    assert r"\udce9.HTML" in capsys.readouterr().out
    assert r"caf\udce9.json" in (tmp_path / os.fsdecode(b"\xe9.HTML")).read_text(encoding="utf-8")


@pytest.mark.parametrize("case", ["absent", "not JSON", "no page"])
def test_bad_input_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    file, out = tmp_path / "bench.json", tmp_path / ("report.pdf" if case == "no page" else "report.html")
    if case != "absent":
        file.write_text("nonsense")
    assert main(["report", str(file), "--out", str(out)]) == 2
    assert (out if case == "no page" else file).name in capsys.readouterr().err
    assert not out.exists()
