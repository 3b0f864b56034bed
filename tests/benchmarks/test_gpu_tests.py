from pathlib import Path

from benchmarks.gpu_tests import Counts, read_report

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest">
  <testcase classname="tests.ops.test_adaln" name="test_a" time="0.1"/>
  <testcase classname="tests.ops.test_adaln" name="test_b" time="0.1"><skipped message="needs two GPUs"/></testcase>
  <testcase classname="tests.ops.test_patch_embed" name="test_a" time="0.1"><failure message="wrong"/></testcase>
  <testcase classname="tests.ops.test_patch_embed" name="test_b" time="0.1"/>
  <testcase classname="tests.nn.test_block" name="test_a" time="0.1"/>
  <testcase classname="" name="tests.ops.test_unpatchify" time="0.0"><error message="import failed"/></testcase>
</testsuite></testsuites>
"""


def test_results_are_counted_by_op(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(REPORT)
    assert read_report(report) == {
        "adaln": Counts(passed=1, skipped=1),
        "patch_embed": Counts(passed=1, failed=1),
        "tests.nn.test_block": Counts(passed=1),
        "unpatchify": Counts(failed=1),
    }
