import subprocess
import sys
from pathlib import Path

from benchmarks._checkout import ROOT
from benchmarks.gpu_tests import Counts, jobs_of_tests, read_results

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest">
  <testcase classname="tests.ops.test_{op}" name="test_a" time="0.1"/>
  <testcase classname="tests.ops.test_{op}" name="test_b" time="0.1"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>
"""
OTHERS = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest">
  <testcase classname="tests.nn.test_block" name="test_a" time="0.1"/>
  <testcase classname="" name="tests.test_schedule" time="0.0"><error message="import failed"/></testcase>
</testsuite></testsuites>
"""


def test_results_are_counted_by_op_over_its_processes(tmp_path: Path) -> None:
    jobs = jobs_of_tests(tmp_path, ["adaln", "unpatchify"], others=True, shards=2)
    assert [job.name for job in jobs] == ["adaln-0", "adaln-1", "unpatchify-0", "unpatchify-1", "others-0"]
    for job in jobs[:4]:
        (tmp_path / f"{job.name}.xml").write_text(REPORT.format(op=job.name[:-2]))
    (tmp_path / "others-0.xml").write_text(OTHERS)
    assert read_results(tmp_path, jobs, {job.name: 0 for job in jobs}) == {
        "adaln": Counts(passed=2, skipped=2),
        "unpatchify": Counts(passed=2, skipped=2),
        "tests.nn.test_block": Counts(passed=1),
        "tests.test_schedule": Counts(failed=1),
    }


def test_a_process_that_did_not_end_is_no_pass(tmp_path: Path) -> None:
    jobs = jobs_of_tests(tmp_path, ["adaln", "unpatchify"], others=False, shards=2)
    for name in ("adaln-0", "unpatchify-0", "unpatchify-1"):
        (tmp_path / f"{name}.xml").write_text(REPORT.format(op=name[:-2]))
    # One stopped by the clock, one that crashed after its report, one whose share was empty.
    results = read_results(tmp_path, jobs, {"adaln-0": 0, "unpatchify-0": -11, "unpatchify-1": 5})
    assert results == {
        "adaln": Counts(passed=1, skipped=1, complete=False),
        "unpatchify": Counts(passed=1, skipped=1, failed=1, complete=False),
    }


def test_reports_of_an_earlier_call_are_removed(tmp_path: Path) -> None:
    (tmp_path / "adaln-0.xml").write_text(REPORT)
    jobs_of_tests(tmp_path, ["adaln"], others=False, shards=1)
    assert not (tmp_path / "adaln-0.xml").exists()


def test_shards_are_every_test_once(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(5))\ndef test(n): pass\n"
    )
    options = ["-q", "-p", "benchmarks.shard", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "--collect-only"]
    found = []
    for place in range(2):
        command = [sys.executable, "-m", "pytest", "-c", "/dev/null", str(tmp_path), *options]
        environment = {"SORA_FAST_SHARD": f"{place}/2", "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        printed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout
        found.append([line for line in printed.splitlines() if "::test" in line])
    assert [len(lines) for lines in found] == [3, 2] and len({*found[0], *found[1]}) == 5
