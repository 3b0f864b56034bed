from pathlib import Path

import pytest

from benchmarks import walk
from benchmarks.jobs import Job
from benchmarks.sanitizer import read_sanitizer, sanitizer_job


def test_without_the_tool_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.sanitizer.shutil.which", lambda name: None)
    assert sanitizer_job(tmp_path, ["adaln"]) is None
    assert read_sanitizer(None, {}) == {"errors": None, "note": "compute-sanitizer is not on the PATH"}


@pytest.mark.parametrize(
    ("log", "codes", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", {"sanitizer": 0}, 0),
        ("========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error\n", {"sanitizer": 1}, 1),
        ("Traceback (most recent call last)\n", {"sanitizer": 1}, None),
        ("========= ERROR SUMMARY: 0 errors\n", {}, None),
    ],
    ids=["clean", "an error", "no summary", "out of time"],
)
def test_what_it_found(tmp_path: Path, log: str, codes: dict[str, int], errors: int | None) -> None:
    job = Job("sanitizer", [], tmp_path / "sanitizer.log")
    job.log.write_text(log)
    assert read_sanitizer(job, codes)["errors"] == errors


def test_it_walks_the_small_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.sanitizer.shutil.which", lambda name: f"/bin/{name}")
    command = sanitizer_job(tmp_path, ["adaln"]).command
    assert command[0] == "/bin/compute-sanitizer" and command[-3:] == ["benchmarks.walk", "--ops", "adaln"]
    walked: list[object] = []
    monkeypatch.setattr(walk, "walk", lambda device, ops: walked.append(ops))
    walk.main(command[command.index("benchmarks.walk") + 1 :])
    assert walked == [["adaln"]]
