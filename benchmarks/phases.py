"""The phases of the GPU suite. Each runs its processes until its hard end, and leaves what it found in the session."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks import grid, smoke, tune
from benchmarks._checkout import ROOT
from benchmarks.environment import Ceilings
from benchmarks.gpu_tests import jobs_of_tests, read_results
from benchmarks.jobs import run_jobs
from benchmarks.outbox import Outbox
from benchmarks.rows import Row, failed
from benchmarks.sanitizer import read_sanitizer, sanitizer_job
from benchmarks.steps import model as whole_model
from benchmarks.suite import DRY, Suite
from benchmarks.tasks import Task
from sora_fast.files import write_text
from sora_fast.ops._records import Machine
from sora_fast.proof.children import Limits, Verdict, child_environment, judged

# Seconds: to import PyTorch and Triton; without a sign of life; that an item may take. Walking through it on a CPU
# proves that all is called as it should be, however busy the CPU is.
_START, _SILENCE, _ITEM, _PATIENCE_OF_DRY = 90.0, 30.0, 45.0, 10.0
# Seconds of rounds: of a plan's direction, of a tuning item, of a model's call.
_ROUNDS, _TRIALS, _CALLS, _ROUNDS_OF_DRY = 1.0, 0.5, 2.0, 0.01
# Without a device nothing goes on: finding it may eat into the next phase, on a machine that has read nothing yet.
_PATIENCE_OF_VERSIONS = 3.0
# Of the tuning's time, for compiling side by side what is then timed alone.
_SHARE_OF_COMPILING = 0.4
_ATTENTION = "packed_attention"


class Stopped(BaseException):
    """Somebody wants this to end, or it cannot go on. No error: what handles those must not swallow it."""


@dataclass
class Session:
    """One call. ops, wholes: that it looks at, see benchmarks/grid.py; dry: small, on a CPU too. device: once it is
    known."""

    outbox: Outbox
    ops: tuple[str, ...]
    wholes: tuple[str, ...]
    dry: bool
    commit: str | None = None
    device: str = "any"
    suite: Suite | None = None
    published: float = 0.0

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def with_model(self) -> bool:
        return whole_model.OP in self.wholes

    @property
    def workers(self) -> int:
        """Processes at once where nothing is timed: compiling takes the time, and the suite itself a core."""
        return max(2, min(14, (os.cpu_count() or 1) - 2)) if self.on_gpu else os.cpu_count() or 1

    def save(self, *, at_least_every: float = 0.0) -> None:
        """Bring everything out, unless that was done just now."""
        if self.suite is not None and time.monotonic() - self.published >= at_least_every:
            self.suite.save()
            self.outbox.publish()
            self.published = time.monotonic()

    def verdicts(self, phase: str, tasks: Sequence[Task], until: float, *, workers: int = 1) -> Iterator[Verdict]:
        """What became of every item of all tasks; all that is known so far is brought out after each."""
        patience = _PATIENCE_OF_DRY if self.dry else 1.0
        limits = Limits(_START * patience, _ITEM * patience, until - time.monotonic(), _SILENCE * patience, workers)
        # One at a time is timed: nothing else should run beside it.
        threads = {"TORCHINDUCTOR_COMPILE_THREADS": "1" if workers > 1 else "4"}
        environment = child_environment(interpreted=self.dry and not self.on_gpu) | threads
        for verdict in judged(tasks, limits, environment, logs=self.outbox.logs / phase):
            yield verdict
            self.save(at_least_every=2.0)

    def task(self, step: str, names: Sequence[str], until: float, **options: object) -> Task:
        return Task(f"benchmarks.steps.{step}", tuple(names), self.device, options, until - time.monotonic() + 60)

    def seconds(self, of_rounds: float) -> float:
        return _ROUNDS_OF_DRY if self.dry else of_rounds


def versions(session: Session, until: float) -> None:
    """What runs here, and what the device reaches at best; raises Stopped where that is not to be found out."""
    now = time.monotonic()
    until = now + _PATIENCE_OF_VERSIONS * (until - now)
    (verdict,) = session.verdicts(
        "versions", [session.task("versions", ["this machine"], until, commit=session.commit)], until
    )
    if verdict.verdict != "passed":
        raise Stopped(f"nothing is known of this machine: {verdict.reason}")
    found = verdict.found
    if found["device"] == "cpu" and not session.dry:
        raise Stopped("there is no CUDA device here; --dry walks through the suite on a CPU")
    session.device, machine = found["device"], Machine(**found["machine"])
    machine = replace(machine, device_class=DRY) if session.dry else machine
    session.suite = Suite(session.outbox.work, machine, found["environment"], Ceilings(**found["ceilings"]))
    session.suite.planned = _planned(session)
    print(found["environment"], flush=True)


def _planned(session: Session) -> list[tuple[str, str]]:
    plans = [(plan.op, plan.label) for plan in _headline(session)]
    names = whole_model.cases(on_gpu=session.on_gpu) if session.with_model else []
    return [*plans, *((whole_model.OP, name) for name in names)]


def _headline(session: Session) -> list[grid.Plan]:
    plans = grid.dry() if session.dry else grid.headline()
    return [plan for plan in plans if plan.op in session.ops + session.wholes]


def smoke_test(session: Session, until: float) -> None:
    """Every kernel against fp64; behind it, the caches of the compilers are filled with what will be timed."""
    plans = smoke.plans(session.ops, session.device)
    session.suite.smoke = smoke.entries(plans)
    _judge(session, "smoke", plans, until, [] if session.dry else _warming(session, until))


def _judge(session: Session, phase: str, plans: Sequence[smoke.Plan], until: float, behind: Sequence[Task]) -> None:
    tasks = [*smoke.tasks(plans, session.device, until - time.monotonic() + 60), *behind]
    known = session.suite.smoke
    for verdict in session.verdicts(phase, tasks, until, workers=session.workers):
        if verdict.plan in known:
            known[verdict.plan] = known[verdict.plan].settled(verdict)
            print(known[verdict.plan], flush=True)
    session.suite.open(phase, [name for name, one in known.items() if one.status == smoke.OPEN])


def _warming(session: Session, until: float) -> list[Task]:
    """A process an op: each holds a GPU's context and one case."""
    plans = _headline(session)
    names = [[plan.name for plan in plans if plan.op == op] for op in dict.fromkeys(plan.op for plan in plans)]
    tasks = [session.task("comparing", some, until, seconds=0) for some in names]
    if session.with_model:
        tasks.insert(0, session.task("model", whole_model.cases(on_gpu=True), until, seconds=0))
    return tasks


def headline(session: Session, until: float) -> None:
    """Our ops beside their peers: first what the project is judged by, then whatever there is time for."""
    plans = _headline(session) if session.dry else grid.rounds(session.ops + session.wholes)
    task = session.task("comparing", [plan.name for plan in plans], until, seconds=session.seconds(_ROUNDS))
    _compare(session, "headline", task, {plan.name: (plan.op, plan.label) for plan in plans}, until)


def model(session: Session, until: float) -> None:
    """A whole model's call."""
    names = whole_model.cases(on_gpu=session.on_gpu) if session.with_model else []
    task = session.task("model", names, until, seconds=session.seconds(_CALLS))
    _compare(session, "model", task, {name: (whole_model.OP, name) for name in names}, until)


def _compare(session: Session, phase: str, task: Task, known: Mapping[str, tuple[str, str]], until: float) -> None:
    for verdict in session.verdicts(phase, [task], until):
        if verdict.verdict == "passed":
            session.suite.compared += [Row(**row) for row in verdict.found]
        elif verdict.verdict == "failed":
            session.suite.compared.append(failed(*known[verdict.plan], verdict.reason))
        if verdict.verdict != "unjudged":
            print(f"{phase}: {verdict.plan}{': ' if verdict.reason else ''}{verdict.reason[:200]}", flush=True)


def tuning(session: Session, until: float) -> None:
    """Attention's launch configurations: compiled side by side, then timed one process at a time; the winners are used
    from then on."""
    items = tune.items() if _ATTENTION in session.ops else []
    items = items[:1] if session.dry else items
    names, suite, now = [item.name for item in items], session.suite, time.monotonic()
    if not session.dry:
        warm_until = now + _SHARE_OF_COMPILING * (until - now)
        tasks = [session.task("tuning", [name], warm_until, seconds=0) for name in names]
        list(session.verdicts("compiling", tasks, warm_until, workers=session.workers))
    open_names = []
    task = session.task("tuning", names, until, seconds=session.seconds(_TRIALS))
    for verdict in session.verdicts("tuning", [task], until):
        if verdict.verdict == "passed":
            suite.trials += map(tune.read, verdict.found)
            print(f"tuning: {verdict.plan}", flush=True)
        else:
            open_names.append(f"{verdict.plan}: {verdict.reason}")
    suite.open("tuning", open_names)
    _use_winners(session)


def _use_winners(session: Session) -> None:
    kernels = ROOT / "kernels"
    where = f"{session.suite.record['device']} {session.suite.record['date'][:10]}"
    major = (
        int(session.suite.machine.device_class.removeprefix("sm_")[:-1]) if session.on_gpu and not session.dry else 9
    )
    text = tune.written(kernels, session.suite.trials, major=major, where=where)
    if text is None:
        return
    write_text(session.outbox.work / tune.TABLE, text)
    if not session.dry:
        before = session.suite.validated()
        write_text(kernels / tune.TABLE, text)
        session.suite.changed(_ATTENTION, before, smoke.entries(smoke.plans([_ATTENTION], session.device)))


def again(session: Session, until: float) -> None:
    """Attention's smoke with the configurations that won; nothing, if none did."""
    if (session.outbox.work / tune.TABLE).exists() and not session.dry:
        _judge(session, "again", smoke.plans([_ATTENTION], session.device), until, [])


def tests(session: Session, until: float) -> None:
    """Those marked `gpu`, of ops first, as far as time goes."""
    folder = session.outbox.logs / "tests"
    folder.mkdir(exist_ok=True)
    if session.dry:
        jobs = jobs_of_tests(folder, session.ops[:1], others=False, shards=1)
    else:
        jobs = jobs_of_tests(folder, session.ops, others=len(session.ops) > 1)
    codes = run_jobs(jobs, workers=session.workers, deadline=until)
    session.suite.tests = read_results(folder, jobs, codes)
    session.suite.open("tests", [job.name for job in jobs if job.name not in codes])


def sanitizer(session: Session, until: float) -> None:
    """Memcheck, where it is installed."""
    job = sanitizer_job(session.outbox.logs, session.ops)
    codes = run_jobs([job] if job else [], workers=1, deadline=until)
    session.suite.sanitizer = read_sanitizer(job, codes)


# In the order, and within the times, of benchmarks/timetable.py.
PHASES: Mapping[str, Callable[[Session, float], None]] = {
    "versions": versions,
    "smoke": smoke_test,
    "headline": headline,
    "tuning": tuning,
    "model": model,
    "again": again,
    "tests": tests,
    "sanitizer": sanitizer,
}
