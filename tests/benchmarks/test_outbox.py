import tarfile
from pathlib import Path

from benchmarks.outbox import ARCHIVE, Outbox


def _archived(out: Path) -> dict[str, str]:
    with tarfile.open(out / ARCHIVE) as archive:
        return {entry.name: archive.extractfile(entry).read().decode() for entry in archive}


def test_few_files_leave_and_the_logs_in_one(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "work", tmp_path / "out", ("suite.json", "table.py"))
    outbox.publish()
    assert [file.name for file in (tmp_path / "out").iterdir()] == [ARCHIVE] and _archived(tmp_path / "out") == {}
    for number in range(20):
        (outbox.logs / f"{number}.log").write_text("x")
    (outbox.logs / "smoke").mkdir()
    (outbox.logs / "smoke" / "deep.log").write_text("deep")
    (outbox.work / "suite.json").write_text("first")
    (outbox.work / "scratch").write_text("stays")
    outbox.publish()
    (outbox.work / "suite.json").write_text("second")
    outbox.publish()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [ARCHIVE, "suite.json"]
    assert (tmp_path / "out" / "suite.json").read_text() == "second"
    assert _archived(tmp_path / "out")["smoke/deep.log"] == "deep" and len(_archived(tmp_path / "out")) == 21


def test_of_a_long_log_the_end_is_kept_and_the_rest_counted(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "work", tmp_path / "out", ())
    (outbox.logs / "long.log").write_text("a" * 300_000 + "the error")
    outbox.publish()
    text = _archived(tmp_path / "out")["long.log"]
    assert text.startswith("(37865 bytes before this are left out)\n") and text.endswith("the error")
    assert len(text) < 270_000
