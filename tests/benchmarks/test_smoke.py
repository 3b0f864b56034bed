import pytest
import torch

from benchmarks import smoke
from benchmarks.smoke import CRASH, FAIL, OPEN, PASS, Smoke
from sora_fast.proof.cases import OPS
from sora_fast.proof.children import NO_TIME, Verdict


def test_on_a_gpu_it_is_all_of_bf16_a_process_an_op() -> None:
    plans = smoke.plans(OPS, "cuda:0")
    assert {plan.op for plan in plans} == set(OPS) and {plan.dtype for plan in plans} == {torch.bfloat16, None}
    tasks = smoke.tasks(plans, "cuda:0", 60)
    assert {name for task in tasks for name in task.names} == {plan.name for plan in plans}
    assert all(len({name.split("[")[0] for name in task.names}) == 1 for task in tasks)
    assert {task.program for task in tasks} == {"benchmarks.prover"} and tasks[0].op == "packed_attention"


def test_dry_it_is_a_plan_an_op() -> None:
    plans = smoke.plans(["adaln", "schedule"], "cpu", dry=True)
    assert [(plan.op, plan.dtype) for plan in plans] == [("adaln", torch.float32), ("schedule", None)]


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        (Verdict("x", "passed"), PASS),
        (Verdict("x", "failed", "output 0: error 1e+00, allowed 1e-02"), FAIL),
        (Verdict("x", "failed", "crashed: SIGSEGV"), CRASH),
        (Verdict("x", "failed", "hung: it was stopped after 45 s"), CRASH),
        (Verdict("x", "unjudged", NO_TIME), OPEN),
        (Verdict("x", "unjudged", "crashed: SIGKILL"), OPEN),
    ],
)
def test_what_became_of_a_plan(verdict: Verdict, status: str) -> None:
    known = smoke.entries(smoke.plans(["adaln"], "cpu", dry=True))
    (before,) = known.values()
    assert before == Smoke("adaln", "float32", "adaln[float32,C72]", OPEN, NO_TIME)
    after = before.settled(verdict)
    assert (after.status, after.reason, after.name) == (status, verdict.reason, before.name)
    assert str(after).startswith(status)
