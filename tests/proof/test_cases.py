"""The cases that prove a kernel: intact kernels pass, and a kernel that is a little wrong does not."""

import pytest
import torch

from sora_fast.ops._dispatch import explain
from sora_fast.proof.cases import COMPILED, INTERPRETED, OPS, Plan, offered, plans
from sora_fast.proof.judge import Measured, judge, results

CPU = torch.device("cpu")
ALL = [plan for op in OPS for dtype in (torch.float32, torch.float16) for plan in plans(op, dtype, INTERPRETED)]


@pytest.mark.parametrize("plan", {plan.name: plan for plan in ALL}.values(), ids=lambda plan: plan.name)
def test_interpreted_kernels_pass(plan: Plan) -> None:
    torch.manual_seed(0)
    measured = judge(plan.build(CPU))
    assert measured and not [str(one) for one in measured if not one.holds]
    assert f"{plan.op}: triton" in explain(), "the kernels were those that ran"
    gradients = [one for one in measured if one.name.startswith("gradient")]
    assert bool(gradients) == (plan.op != "schedule")


def test_every_op_with_a_kernel_has_cases() -> None:
    from pathlib import Path

    kernels = {file.stem for file in (Path(__file__).resolve().parents[2] / "kernels").glob("[!_]*.py")}
    assert set(OPS) == {name.removesuffix("_backward") for name in kernels}


def test_a_gpu_is_asked_for_every_dtype_and_family() -> None:
    for op in OPS:
        found = offered(op, "cuda:0")
        dtypes = {plan.dtype for plan in found}
        assert dtypes == ({None} if op == "schedule" else {torch.bfloat16, torch.float16, torch.float32})
        assert len({plan.name for plan in found}) == len(found)
    labels = [plan.label for plan in offered("packed_attention", "cuda:0")]
    assert all(any(label.startswith(f"D{dim},") for label in labels) for dim in COMPILED.head_dims)


@pytest.mark.parametrize("op", OPS)
def test_a_gpus_cases_can_be_made(op: str) -> None:
    """As large as they are there, in plain PyTorch, which on a GPU is what the kernels are held to."""
    for plan in plans(op, torch.bfloat16, COMPILED):
        trial = plan.build(CPU)
        call = trial.call.on("torch")
        plain, truth = results(call, trial), results(call.exact(), trial)
        assert plain.keys() == truth.keys()
        assert all(x.isfinite().all() for x in truth.values()), plan.name


@pytest.mark.parametrize(("error", "holds"), [(0.0, True), (1.0, True), (1.1, False), (float("nan"), False)])
def test_the_limit_counts_and_nan_is_beyond_it(error: float, holds: bool) -> None:
    assert Measured("output 0", error, 1.0).holds == holds


@pytest.mark.parametrize("place", ["padding", "row", "rounding"])
def test_a_kernel_that_is_a_little_wrong_fails(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sora_fast.kernels import gated_residual as kernels

    name = "gated_residual_forward"
    intact = getattr(kernels, name)

    def broken(*args: object, **options: object) -> torch.Tensor:
        out = intact(*args, **options)
        if place == "padding":
            out[-1] = float("nan")
        elif place == "row":
            out[7, 5] += 1e-4
        else:
            out.copy_(out.bfloat16())
        return out

    plan = next(plans("gated_residual", torch.float32, INTERPRETED))  # the usual form, by that kernel
    monkeypatch.setattr(kernels, name, broken)
    torch.manual_seed(0)
    assert [one.name for one in judge(plan.build(CPU)) if not one.holds] == ["output 0"]
