"""From the JSON of benchmarks to a page that shows them: `sora-fast report`."""

from sora_fast.report.results import Measurement, Result, Spread, read_result
from sora_fast.report.write import write_report

__all__ = ["Measurement", "Result", "Spread", "read_result", "write_report"]
