"""What a trainer or an engine does when it starts: prove the kernels that it needs, once a machine."""

import logging
import os
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from sora_fast.ops import _records
from sora_fast.ops._dispatch import asked_for
from sora_fast.proof.cases import OPS, backends
from sora_fast.proof.proving import Report, run

log = logging.getLogger(__name__)

SECONDS = 60.0


def prove_at_start(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    *,
    leads: bool = True,
    wait: Callable[[], object] = lambda: None,
) -> None:
    """Prove what has no record yet on a GPU, in at most a minute; on other devices, do nothing.

    dtypes: that the ops will be called with. leads: whether this worker proves, the first one of its machine; wait:
    returns when every worker has called it. Nothing is proved with SORA_FAST_PROVE=0, where a backend is asked for, or
    inside a compiled region or the capture of a graph. What cannot be proved is said, and stays off.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if leads and _wanted() and (ops := _unknown(device, dtypes)):
        try:
            _say(_proved(ops, device, dtypes))
        except Exception as error:  # a fault of ours must not cost anybody a run
            log.warning("kernels could not be proved, so plain PyTorch runs in their place: %s", error)
    wait()
    _records.forget()


def _wanted() -> bool:
    off = os.environ.get("SORA_FAST_PROVE") == "0" or asked_for() is not None
    return not off and _records.package_version("triton") is not None and not torch.cuda.is_current_stream_capturing()


def _unknown(device: torch.device, dtypes: Sequence[torch.dtype]) -> list[str]:
    wanted = {op: [None] if op == "schedule" else dtypes for op in OPS}

    def is_unknown(op: str, dtype: torch.dtype | None) -> bool:
        return any(_records.find(op, backend, dtype, device) is None for backend in backends(op, device, dtype))

    return [op for op in OPS if any(is_unknown(op, dtype) for dtype in wanted[op])]


def _proved(ops: Sequence[str], device: torch.device, dtypes: Sequence[torch.dtype]) -> Report:
    with tqdm(desc="proving kernels, once on this machine", unit=" cases", leave=False) as bar:

        def progress(done: int, cases: int) -> None:
            bar.total = cases
            bar.update(done - bar.n)

        return run(ops, device=device, seconds=SECONDS, dtypes=dtypes, progress=progress)


def _say(report: Report) -> None:
    if not report.ok or report.unwritten:
        log.warning("%s", report.only_what_matters())
