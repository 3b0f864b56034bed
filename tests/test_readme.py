"""The code in the README runs as it stands there."""

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
