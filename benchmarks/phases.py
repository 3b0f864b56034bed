"""The phases of the GPU suite. Each runs its processes until its hard end, and leaves what it found in the session."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import grid, smoke, travelling, tune
from benchmarks._checkout import ROOT
from benchmarks.environment import Ceilings
from benchmarks.gpu_tests import jobs_of_tests, read_results
from benchmarks.jobs import run_jobs
from benchmarks.rows import Row, failed
from benchmarks.sanitizer import read_sanitizer, sanitizer_job
from benchmarks.session import Session, Stopped
from benchmarks.steps import model as whole_model
from benchmarks.steps import sampling, training
from benchmarks.suite import DRY, Suite
from benchmarks.tasks import Task
from sora_fast.files import write_text
from sora_fast.ops._records import Machine
from sora_fast.proof.cases import COMPILED_OPS

# Seconds of rounds: of a plan's direction, of a tuning item, of what a whole model does.
_ROUNDS, _TRIALS, _CALLS = 1.0, 0.5, 2.0
# Seconds that an item of a whole model may take: it compiles, and is held to PyTorch in fp64.
_WHOLE = 90.0
# What a whole model does, by the module of benchmarks/steps; the most telling first.
WHOLE_MODELS: Mapping[str, Any] = {"model": whole_model, "sampling": sampling, "training": training}
# Without a device nothing goes on: finding it may eat into the next phase, on a machine that has read nothing yet.
_PATIENCE_OF_VERSIONS = 3.0
# Of the tuning's time, for compiling side by side what is then timed alone.
_SHARE_OF_COMPILING = 0.4
_ATTENTION = "packed_attention"


def versions(session: Session, until: float) -> None:
    """What runs here, and what the device reaches at best; raises Stopped where that is not to be found out."""
    now = time.monotonic()
    until = now + _PATIENCE_OF_VERSIONS * (until - now)
    task = session.task("versions", ["this machine"], until, commit=session.commit, dry=session.dry)
    (verdict,) = session.verdicts("versions", [task], until)
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
    if session.cache is not None:
        print(_take_cache(session, session.cache, machine.device_class), flush=True)


def _take_cache(session: Session, cache: Path, device_class: str) -> str:
    """Let all processes find what was compiled elsewhere; says how many kernels, or why not."""
    reason = travelling.why_not(cache, target=device_class)
    if reason:
        return f"--cache is not used, every kernel is compiled here: {reason}"
    folder = session.outbox.work / "triton"
    count = travelling.unpack(cache, folder)
    session.environment["TRITON_CACHE_DIR"] = str(folder)
    return f"{count} compiled kernels of {cache}; what is not among them is compiled here"


def build(session: Session, until: float) -> None:
    """The compiled libraries, in the checkout: CUDA C++ is built where it runs. Without them Triton's remain."""
    if session.dry:
        return
    tasks = [session.task("building", [name], until) for name in ("cpu", "cuda")]
    for verdict in session.verdicts("build", tasks, until, item=until - time.monotonic(), workers=2):
        passed = verdict.verdict == "passed"
        said = verdict.found if passed else f"not built: {verdict.reason}"
        session.suite.libraries[verdict.plan] = said
        session.suite.built |= {verdict.plan} if passed else set()
        print(f"{verdict.plan}: {said}", flush=True)


def _planned(session: Session) -> list[tuple[str, str]]:
    plans = _headline(session) if "headline" in session.phases else []
    calls = _calls(session).items() if "model" in session.phases else []
    named = ((WHOLE_MODELS[step].OP, name) for step, names in calls for name in names)
    return [*((plan.op, plan.label) for plan in plans), *named]


def _calls(session: Session) -> dict[str, list[str]]:
    """By their step."""
    wanted = {step: module for step, module in WHOLE_MODELS.items() if module.OP in session.wholes}
    return {step: module.cases(dry=session.dry) for step, module in wanted.items()}


def _headline(session: Session) -> list[grid.Plan]:
    plans = grid.tiny() if session.dry else grid.headline()
    return [plan for plan in plans if plan.op in session.ops + session.wholes]


def smoke_test(session: Session, until: float) -> None:
    """Every kernel against fp64; behind it, the caches of the compilers are filled with what will be timed."""
    plans = smoke.plans(session.ops, session.device, dry=session.dry, compiled=_compiled(session.suite))
    session.suite.smoke = smoke.entries(plans)
    _judge(session, "smoke", plans, until, [] if session.dry else _warming(session, until))


def _compiled(suite: Suite) -> list[str]:
    """Ops that the CUDA library has for this GPU: attention is for Hopper alone."""
    on_hopper = suite.machine.device_class == "sm_90"
    return [op for op in COMPILED_OPS if "cuda" in suite.built and (on_hopper or op != _ATTENTION)]


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
    tasks = [session.timed("comparing", some, until, seconds=0) for some in names if "headline" in session.phases]
    if "model" not in session.phases:
        return tasks
    # Not of training, which would take the memory that the kernels are being judged in.
    calls = {step: names for step, names in _calls(session).items() if step != "training"}
    return [*(session.timed(step, names, until, seconds=0) for step, names in calls.items()), *tasks]


def headline(session: Session, until: float) -> None:
    """Our ops beside their peers: first what the project is judged by, then whatever there is time for."""
    plans = _headline(session) if session.dry else grid.rounds(session.ops + session.wholes)
    task = session.timed("comparing", [plan.name for plan in plans], until, seconds=_ROUNDS)
    _compare(session, "headline", [task], {plan.name: (plan.op, plan.label) for plan in plans}, until)


def model(session: Session, until: float) -> None:
    """A whole model's call, a sampler's step, a training step."""
    calls = _calls(session)
    tasks = [session.timed(step, names, until, seconds=_CALLS) for step, names in calls.items()]
    known = {name: (WHOLE_MODELS[step].OP, name) for step, names in calls.items() for name in names}
    _compare(session, "model", tasks, known, until, item=_WHOLE)


def _compare(
    session: Session,
    phase: str,
    tasks: Sequence[Task],
    known: Mapping[str, tuple[str, str]],
    until: float,
    **limits: float,
) -> None:
    for verdict in session.verdicts(phase, tasks, until, **limits):
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
        tasks = [session.timed("tuning", [name], warm_until, seconds=0) for name in names]
        # Many kernels an item: what is late is compiled when it is timed.
        list(session.verdicts("compiling", tasks, warm_until, workers=session.workers, item=warm_until - now))
    open_names = []
    task = session.timed("tuning", names, until, seconds=_TRIALS)
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
    major = 9 if session.dry else int(session.suite.machine.device_class.removeprefix("sm_")[:-1])
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
    "build": build,
    "smoke": smoke_test,
    "headline": headline,
    "tuning": tuning,
    "model": model,
    "again": again,
    "tests": tests,
    "sanitizer": sanitizer,
}
