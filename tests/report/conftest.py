from pathlib import Path

import pytest

from sora_fast.report import write_report
from tests.report.made_up import save, suite


@pytest.fixture(scope="session")
def two_commits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two results; the second one's adaln is slower backward."""
    folder = tmp_path_factory.mktemp("two")
    files = [save(suite(), folder / "a.json"), save(suite(commit="b" * 40, slower=1.2), folder / "b.json")]
    write_report(files, folder / "report.html")
    return folder / "report.html"
