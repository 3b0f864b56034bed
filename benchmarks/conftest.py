"""pytest-benchmark on this project's terms: the device's clock on a GPU, and the ceilings measured first."""

from typing import Any

import pytest
import torch

from benchmarks import _checkout

_checkout.make_importable()

from benchmarks.contests import Arena, Contest  # noqa: E402  (needs what stands above)
from benchmarks.environment import environment, versions  # noqa: E402
from benchmarks.grid import plans  # noqa: E402
from benchmarks.rows import Row  # noqa: E402
from benchmarks.timing import keep_freed_memory  # noqa: E402

Key = tuple[str, str]


def pytest_configure(config: pytest.Config) -> None:
    """The timer, unless the user names another, and the host's allocator."""
    keep_freed_memory()
    if torch.cuda.is_available() and config.getoption("benchmark_timer", "").startswith(("timeit.", "time.")):
        config.option.benchmark_timer = "benchmarks.timing.device_clock"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info.update(versions(), device=environment()["device"])


@pytest.fixture(scope="session")
def arena() -> Arena:
    record = environment()
    return Arena.open({name: record[name] for name in ("commit", *versions())})


@pytest.fixture(scope="session")
def measured() -> dict[Key, list[Row] | Exception]:
    """Rows of the contests so far, or why there are none."""
    return {}


@pytest.fixture
def contest(
    request: pytest.FixtureRequest,
    arena: Arena,
    measured: dict[Key, list[Row] | Exception],
    benchmark: Any,
    op: str,
    case: str,
    direction: str,
    variant: str,
) -> Contest:
    """The contest that the test's parameters name; measured by the first test that asks for it."""
    key = op, case
    if key not in measured:
        plan = next(plan for plan in plans(op, on_gpu=torch.cuda.is_available()) if plan.label == case)
        try:
            measured[key] = arena.measure(plan, _selected(request.session, key), timed=benchmark.enabled)
        except Exception as error:
            measured[key] = error
    if isinstance(measured[key], Exception):
        raise measured[key]
    row = next(row for row in measured[key] if row.direction == direction)
    return Contest(benchmark, row, variant, arena)


def _selected(session: pytest.Session, key: Key) -> list[str]:
    """The variants whose tests will run, in order."""
    chosen = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    return list(dict.fromkeys(p["variant"] for p in chosen if (p.get("op"), p.get("case")) == key))
