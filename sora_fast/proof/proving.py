"""prove: which kernels are right on this machine, found out in processes of their own and recorded."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import torch

from sora_fast.ops import _records
from sora_fast.ops._records import Machine, Record, dtype_name
from sora_fast.proof.cases import OPS, Plan
from sora_fast.proof.children import Limits, Verdict, child_environment, judged
from sora_fast.proof.tasks import DEFAULT_CASES, Task, offered

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """What became of an op in a dtype: "passed" or "failed", which are recorded, or "unjudged".

    cases: how many there are. wrong: those that did not pass, with their numbers. backend: whose kernels.
    """

    op: str
    dtype: str
    verdict: str
    cases: int
    wrong: tuple[Verdict, ...] = ()
    backend: str = "triton"

    def __str__(self) -> str:
        backend = "" if self.backend == "triton" else f" on {self.backend}"
        right = f"{self.cases - len(self.wrong)} of {self.cases} cases right"
        line = f"{self.op} {self.dtype}{backend}: {self.verdict}, {right}"
        return "\n".join([line, *(f"    {wrong.plan}: {wrong.reason}" for wrong in self.wrong[:4]), *self._rest()])

    def _rest(self) -> list[str]:
        return [f"    and {len(self.wrong) - 4} more"] if len(self.wrong) > 4 else []

    def record(self, machine: Machine, device: str) -> Record:
        return Record(
            op=self.op,
            backend=self.backend,
            dtype=self.dtype,
            machine=machine,
            source=_records.source_hash(self.op, self.backend),
            passed=self.verdict == "passed",
            cases=self.cases,
            reason="; ".join(f"{one.plan}: {one.reason}" for one in self.wrong if one.verdict == "failed")[:2000],
            device=device,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            note="sora_fast.prove",
        )


@dataclass(frozen=True)
class Report:
    """What `prove` found. device: its name. unwritten: why the next process will not know it, or nothing."""

    machine: Machine
    device: str
    found: tuple[Found, ...] = ()
    seconds: float = 0.0
    unwritten: str = ""

    def having(self, verdict: str) -> tuple[Found, ...]:
        return tuple(found for found in self.found if found.verdict == verdict)

    @property
    def ok(self) -> bool:
        """Whether everything that was looked at passed."""
        return all(found.verdict == "passed" for found in self.found)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def only_what_matters(self) -> str:
        """Without what passed."""
        return str(replace(self, found=self.having("failed") + self.having("unjudged")))

    def _lines(self) -> Iterator[str]:
        yield f"{self.device} ({self.machine.device_class}), {self.seconds:.0f} s"
        for found in self.found:
            yield str(found)
        if self.machine.device_class == _records.INTERPRETER:
            yield "Kernels were interpreted, for there is no GPU here: this proves nothing for one."
        if self.unwritten:
            yield (
                f"It holds for this process only, and could not be recorded: {self.unwritten}. "
                "SORA_FAST_CACHE=FOLDER names another folder."
            )
        if self.having("failed"):
            yield (
                "What failed stays off: plain PyTorch runs in its place, or SORA_FAST_BACKEND=triton where you ask for "
                "it. It is a fault of sora_fast: please open an issue with these lines and the output of "
                "`sora-fast doctor --json`."
            )
        if self.having("unjudged"):
            yield "What is unjudged stays off until it is proved: `sora-fast doctor --prove --minutes 10`."


def prove(
    ops: Sequence[str] | None = None,
    *,
    minutes: float = 2.0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Hold the kernels, Triton's and CUDA C++'s, to fp64 on this machine; the right ones are the default from now on.

    Runs in processes of its own, so that neither a crash nor a hang harms this one, and ends in time. Results are
    recorded in the user's cache (SORA_FAST_CACHE, else sora_fast in XDG_CACHE_HOME or ~/.cache) for this kind of
    device, driver, torch, Triton, version and kernel source, those of earlier calls are replaced. Without a GPU the
    kernels are interpreted: that shows that they compute what they should, and counts for no device.

    ops: names; None: all that have kernels. device: None: the first GPU, if there is one.
    progress: called with (cases done, cases). Raises ValueError for what is no such op, time or device.
    """
    return run(ops, device=_device(device), seconds=60 * _checked(minutes), progress=progress)


def run(
    ops: Sequence[str] | None,
    *,
    device: torch.device,
    seconds: float,
    dtypes: Sequence[torch.dtype] | None = None,
    progress: Progress | None = None,
    limits: Limits | None = None,
    cases: str = DEFAULT_CASES,
) -> Report:
    """As `prove`. dtypes: None: all. limits: None: what suits the device. cases: the module that has them."""
    began = time.monotonic()
    plans = [plan for op in _checked_ops(ops) for plan in offered(op, str(device), cases)]
    plans = [plan for plan in plans if dtypes is None or plan.dtype is None or plan.dtype in dtypes]
    machine, name = Machine.of(device), _name(device)
    if _records.package_version("triton") is None:
        raise ValueError("ops: there are no kernels to prove without the package triton; pip install triton")
    done, verdicts = 0, {}

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(plans))

    limits = limits or _limits(seconds)
    tasks = list(tasks_of(plans, Task("", str(device), (), limits.total + 60, cases)))
    for verdict in judged(tasks, limits, child_environment(interpreted=device.type != "cuda"), count):
        verdicts[verdict.plan] = verdict
    found = tuple(_found(plans, verdicts))
    records = [one.record(machine, name) for one in found if one.verdict != "unjudged"]
    return Report(machine, name, found, time.monotonic() - began, _records.keep(records))


def tasks_of(plans: Sequence[Plan], like: Task) -> Iterator[Task]:
    """A child an op, and a family of one that takes long."""
    keys = [(plan.op, plan.backend, plan.family) for plan in plans]
    for key in dict.fromkeys(keys):
        names = tuple(plan.name for plan, its in zip(plans, keys, strict=True) if its == key)
        yield replace(like, op=key[0], names=names)


def _found(plans: Sequence[Plan], verdicts: dict[str, Verdict]) -> Iterator[Found]:
    keys = [(plan.op, plan.dtype, plan.backend) for plan in plans]
    for key in dict.fromkeys(keys):
        mine = [verdicts[plan.name] for plan, its in zip(plans, keys, strict=True) if its == key]
        wrong = tuple(verdict for verdict in mine if verdict.verdict != "passed")
        kinds = {verdict.verdict for verdict in mine}
        overall = "failed" if "failed" in kinds else "unjudged" if "unjudged" in kinds else "passed"
        yield Found(key[0], dtype_name(key[1]), overall, len(mine), wrong, key[2])


def _limits(seconds: float) -> Limits:
    # Compiling is what takes the time, and a child holds a GPU's context.
    return Limits(total=seconds, workers=max(1, min(8, (os.cpu_count() or 1) // 2)))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU, interpreted"


def _checked_ops(ops: Sequence[str] | None) -> Sequence[str]:
    if isinstance(ops, str):
        raise TypeError(f"ops: {ops!r}; it must be a list of names, like [{ops!r}]")
    for op in ops or ():
        if op not in OPS:
            raise ValueError(f"ops: {op!r} has no kernel; it must be one of {', '.join(OPS)}")
    return OPS if ops is None else list(dict.fromkeys(ops))


def _checked(minutes: float) -> float:
    if not 0 < minutes < float("inf"):
        raise ValueError(f"minutes: {minutes}; it must be a positive number")
    return minutes


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"device: {device}; it must be cuda, or cpu, where kernels are interpreted")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device}; there is no usable GPU here")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
