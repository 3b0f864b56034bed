"""What the steps about a whole model share: who can do the work, who does it right, and what the device says."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from benchmarks.entrants import Absent
from benchmarks.nvml import Gauge
from benchmarks.rows import PEERS, Row
from benchmarks.timing import Timing, Work, host_microseconds

Made = TypeVar("Made")
OURS = "triton"


def made(makers: Mapping[str, Callable[[], Made]], row: Row) -> dict[str, Made]:
    """Those that could be made; why the others could not stands in `row`. Raises what ours does."""
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:
            if name == OURS:
                raise
            row.absent[name] = str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {error}"[:500]
    return found


def leave_out_the_wrong(made: dict[str, Any], row: Row) -> None:
    """Who is wrong is not timed, but for ours, which the suite then calls wrong. `row.errors` is filled before."""
    for name in list(made):
        right = row.agrees(name) if name.startswith(OURS) else row.agrees(name, PEERS)
        if name != OURS and not right:
            far, plain = (max(row.errors[one]) for one in (name, "torch"))
            row.absent[name] = f"wrong: {far:.1e} from the truth, PyTorch {plain:.1e}"
            del made[name]


def need_gpu(device: torch.device) -> None:
    """Absent elsewhere: minutes of compiling prove little on a CPU, and it has no graphs."""
    if device.type != "cuda":
        raise Absent("it needs a GPU")


def notes(works: Mapping[str, Work], row: Row, device: torch.device) -> dict[str, dict[str, Any]]:
    """Memory, energy and the host's time, by who was timed; none on a CPU."""
    if device.type != "cuda":
        return {}
    gauge = Gauge(device)
    return {
        name: gauge.read(work, Timing.of(row.rounds[name]).median)
        | {"host_us": host_microseconds(work, device, calls=5)}
        for name, work in works.items()
    }
