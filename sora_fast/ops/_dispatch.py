"""Which backend runs an op: asked for, set by the user, or the best that is proved on this device."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from importlib.util import find_spec

import torch

from sora_fast.ops import _library, _records

log = logging.getLogger(__name__)

BACKENDS = ("torch", "cpu", "triton", "cuda", "flash_attn", "xformers")
# Why a kernel is not chosen that nobody has found wrong either, and what makes it known to be right.
UNPROVED, PROVE = "no recorded pass", "sora-fast doctor --prove"
# Tried in this order when nobody asks for a backend.
_PREFERENCE = ("cuda", "triton", "cpu", "torch")

_forced: ContextVar[str | None] = ContextVar("sora_fast_backend", default=None)
_calls: dict[tuple[str, str], "_Record"] = {}


class _Record:
    """How often an op ran on a backend, and why not on the ones before it in the order of preference."""

    def __init__(self) -> None:
        self.count = 0
        self.refused: dict[str, str] = {}


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Run every op inside on `backend` where the op has it; None returns to the automatic choice.

    A compiled graph keeps the backend that it was compiled with, and a module that recomputes the one of its forward
    pass. What you recompute yourself (torch.utils.checkpoint) may run in a backward pass's own thread, which this does
    not reach: enter it inside the function that is recomputed.
    """
    _check_name(backend, "backend")
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def explain() -> str:
    """For each op called so far: which backend ran, how often it was chosen, and why not the others."""
    lines = []
    for (op, backend), record in sorted(_calls.items()):
        lines.append(f"{op}: {backend}, chosen {record.count}×")
        lines.extend(f"    not {name}: {reason}" for name, reason in record.refused.items())
    return "\n".join(lines) or "no op has been called"


def counts() -> dict[tuple[str, str], int]:
    """How often each backend has been chosen for each op so far, by (op, backend)."""
    return {key: record.count for key, record in _calls.items()}


def choose(
    op: str,
    backend: str | None,
    device: torch.device,
    offered: tuple[str, ...] = ("torch", "triton"),
    dtype: torch.dtype | None = None,
    *,
    unsuited: tuple[tuple[str, str], ...] = (),
) -> str:
    """The backend to run `op` with on tensors of `device`.

    backend: what the caller asked for (None: automatic); offered: what the op has for such tensors. dtype: theirs, for
        which a kernel must be proved; None, of an op that computes with integers only. unsuited: backends of those
        offered that do not take these very tensors, each with the reason.
    Raises ValueError if the backend asked for cannot run here.
    """
    _check_name(backend, "backend")
    asked = asked_for()
    kernels_run = device.type == "cuda" or interpreting()
    chosen, reasons = _decide(op, backend, asked, device, offered, dtype, unsuited, kernels_run, _records.epoch())
    record = _calls.get((op, chosen)) or _calls.setdefault((op, chosen), _Record())
    record.count += 1
    if reasons:
        record.refused.update(reasons)
    return chosen


# A graph keeps the choice made while it was traced: Dynamo must neither trace this bookkeeping nor guard on it. This is
# all that torch.compiler.assume_constant_result does, which would import the whole of Dynamo first: over a second.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


# A choice costs 10 µs, and a small op has 35: it is made once for all that it depends on.
@lru_cache(maxsize=1024)
def _decide(
    op: str,
    backend: str | None,
    asked: str | None,
    device: torch.device,
    offered: tuple[str, ...],
    dtype: torch.dtype | None,
    unsuited: tuple[tuple[str, str], ...],
    kernels_run: bool,
    epoch: int,
) -> tuple[str, dict[str, str]]:
    """The backend, and why not those before it. asked: by the user, for all ops; kernels_run: Triton's, on `device`;
    epoch: of the records."""
    _check_name(backend, "backend")
    refused: dict[str, str] = {}
    wanted = backend or asked
    if wanted is not None:
        reason = dict(unsuited).get(wanted) or _unavailable(op, wanted, device.type, offered)
        if reason is None:
            return wanted, refused
        if backend is not None:
            raise ValueError(f"backend: {backend!r} cannot run {op} here: {reason}")
        refused[wanted] = reason
    chosen, reasons = default(op, device, offered, dtype, unsuited)
    if reasons.get("triton", "").startswith(UNPROVED):
        _remind()
    return chosen, refused | reasons


def asked_for() -> str | None:
    """The backend that the user has set for all ops, if one."""
    asked = _forced.get()
    if asked is None:
        asked = os.environ.get("SORA_FAST_BACKEND") or None
        _check_name(asked, "SORA_FAST_BACKEND")
    return asked


def default(
    op: str,
    device: torch.device,
    offered: tuple[str, ...],
    dtype: torch.dtype | None,
    unsuited: tuple[tuple[str, str], ...] = (),
) -> tuple[str, dict[str, str]]:
    """The backend when nobody asks for one, and why not those before it; arguments and errors as in `choose`."""
    refused: dict[str, str] = {}
    for name in _PREFERENCE:
        reason = dict(unsuited).get(name) or _unavailable(op, name, device.type, offered)
        reason = reason or _unproved(op, name, device, dtype)
        if reason is None:
            return name, refused
        refused[name] = reason
    raise ValueError(f"backend: none of {offered} can run {op} on {device}: {refused}")


def _check_name(backend: str | None, argument: str) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{argument}: {backend!r}; it must be one of {BACKENDS}, or None")


def _unavailable(op: str, backend: str, device_type: str, offered: tuple[str, ...]) -> str | None:
    if backend not in offered:
        return f"{op} has no {backend} backend for such tensors"
    if backend == "triton":
        if find_spec("triton") is None:
            return "the package triton is not installed"
        if device_type != "cuda" and not interpreting():
            return f"the tensors are on {device_type}; Triton needs cuda, or TRITON_INTERPRET=1"
    elif backend in ("flash_attn", "xformers") and find_spec(backend) is None:
        return f"the package {backend} is not installed"
    elif backend in ("cuda", "flash_attn", "xformers") and device_type != "cuda":
        return f"the tensors are on {device_type}; {backend} needs cuda"
    elif backend == "cpu" and device_type != "cpu":
        return f"the tensors are on {device_type}; cpu needs them on a CPU"
    elif backend in ("cpu", "cuda"):
        return _library.missing(backend)
    return None


def _unproved(op: str, backend: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    if backend in ("torch", "cpu"):  # which the tests compare wherever they run
        return None
    if device.type != "cuda":
        return "the interpreter is for tests: ask for it by name"
    record = _records.find(op, backend, dtype, device)
    if record is not None and record.passed:
        return None
    if record is not None:
        return f"wrong on this machine ({record.reason}); `{PROVE}` looks again"
    if backend == "cuda" and op in _library.OPS:
        return f"{UNPROVED}, and nothing makes one yet: ask for it by name"
    where = f"{_records.dtype_name(dtype)} on {_records.device_class(device)}"
    return f"{UNPROVED} of {where}: `{PROVE}` proves it here"


@cache
def _remind() -> None:
    """Once, to users of single ops, whom nobody else tells; of several workers, by one."""
    if os.environ.get("SORA_FAST_PROVE") != "0" and os.environ.get("RANK", "0") == "0":
        log.warning("plain PyTorch runs in place of faster kernels, which are not proved on this GPU yet: `%s`", PROVE)


def interpreting() -> bool:
    """True if Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
