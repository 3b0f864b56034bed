import sys
import time
from pathlib import Path

import pytest

from benchmarks.jobs import Job, run_jobs


def _job(folder: Path, name: str, script: str, **environment: str) -> Job:
    return Job(name, [sys.executable, "-S", "-c", script], folder / f"{name}.log", environment)


def test_exit_codes_logs_and_environment(tmp_path: Path) -> None:
    jobs = [
        _job(tmp_path, "good", "import os; print(os.environ['WORD'])", WORD="hello"),
        _job(tmp_path, "bad", "raise SystemExit(3)"),
    ]
    assert run_jobs(jobs, workers=1, deadline=time.monotonic() + 60) == {"good": 0, "bad": 3}
    assert (tmp_path / "good.log").read_text() == "hello\n"


def test_who_is_late_is_killed_with_its_children(tmp_path: Path) -> None:
    child = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    started = time.monotonic()
    codes = run_jobs([_job(tmp_path, "late", parent)], workers=2, deadline=started + 1)
    assert codes == {} and time.monotonic() - started < 2.5
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def test_what_has_no_time_is_not_started(tmp_path: Path) -> None:
    assert run_jobs([_job(tmp_path, "never", "")], workers=1, deadline=time.monotonic()) == {}
    assert not (tmp_path / "never.log").exists()


def test_an_interruption_ends_the_processes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = []
    start = __import__("benchmarks.jobs", fromlist=["_start"])._start
    monkeypatch.setattr("benchmarks.jobs._start", lambda job: processes.append(start(job)) or processes[-1])

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.jobs.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([_job(tmp_path, "long", "import time; time.sleep(60)")], workers=1, deadline=time.monotonic() + 60)
    assert [process.returncode for process in processes] == [-9]
