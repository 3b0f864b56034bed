"""The code in the README runs as it stands there, and its figures have results behind them."""

import re

import pytest

from tests.test_packaging import ROOT


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_python_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    assert blocks, f"{name} has no examples"
    exec("\n".join(blocks), {})
    printed = capsys.readouterr().out
    assert "[(16, 8, 18, 32), (16, 5, 24, 24), (16, 1, 40, 30)]" in printed
    assert "packed_attention" in printed


@pytest.mark.parametrize(
    ("name", "title"), [("README.md", "## What was measured"), ("README.zh-CN.md", "## 测量了什么")]
)
def test_figures_name_their_results(name: str, title: str) -> None:
    """Every table, and every paragraph with a number in it, comes under a paragraph that names its JSON."""
    section = (ROOT / name).read_text().split(f"{title}\n")[1].split("\n## ")[0]
    source = ""
    for part in filter(None, section.split("\n\n")):
        named = re.findall(r"benchmarks/results/[\w./-]+\.json", part)
        source = "" if part.startswith("**") else source  # a new topic
        assert all((ROOT / file).exists() for file in named), f"{name} names results that are not there: {named}"
        source = named[0] if named else source
        words = re.sub(r"`[^`]*`|\bfp\d+\b", "", part)
        assert source or not re.search(r"\d", words), f"{name}: figures without results: {part[:200]}"


def test_both_languages_have_the_same_figures() -> None:
    english, chinese = (
        re.search(rf"{title}\n(.*?)\n## ", (ROOT / name).read_text(), flags=re.DOTALL)[1]
        for name, title in (("README.md", "## What was measured"), ("README.zh-CN.md", "## 测量了什么"))
    )
    assert sorted(re.findall(r"\d+(?:[.,]\d+)*", english)) == sorted(re.findall(r"\d+(?:[.,]\d+)*", chinese))
