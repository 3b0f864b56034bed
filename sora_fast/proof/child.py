"""A process that judges the plans of one op, and may be lost in doing so.

    python -m sora_fast.proof.child JSON

JSON: see `Task`. Prints a line of JSON when it is ready, when it begins a plan, and when it knows what became of it.
"""

import faulthandler
import sys
from importlib import import_module

import torch

from sora_fast.memory import is_out_of_memory
from sora_fast.proof.cases import Plan
from sora_fast.proof.judge import judge
from sora_fast.proof.tasks import Task
from sora_fast.proof.telling import Say, telling


def work(task: Task, say: Say) -> None:
    """Judge all plans of a task; stops after the first that raises on a GPU, whose state nobody knows then."""
    device = torch.device(task.device)
    plans = task.plans()
    torch.zeros(1, device=device)
    import_module("sora_fast.kernels._launch")  # and Triton: seconds that are no plan's
    say({"ready": len(plans)})
    for plan in plans:
        say({"begins": plan.name})
        verdict, reason = _verdict(plan, device)
        say({"ends": plan.name, "verdict": verdict, "reason": reason})
        if verdict != "passed" and device.type == "cuda":
            return


def _verdict(plan: Plan, device: torch.device) -> tuple[str, str]:
    try:
        torch.manual_seed(0)
        wrong = [str(measured) for measured in judge(plan.build(device), plan.backend) if not measured.holds]
    except Exception as error:
        if is_out_of_memory(error):
            return "unjudged", f"out of memory: {_first_line(error)}"
        return "failed", f"{type(error).__name__}: {_first_line(error)}"
    return ("failed", "; ".join(wrong)) if wrong else ("passed", "")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")[:300]


def main() -> None:
    task = Task.read(sys.argv[1])
    # Should nobody be there any more to end it. Not a signal, which a process that waits for a GPU would not see.
    faulthandler.dump_traceback_later(task.seconds, exit=True)
    with telling() as say:
        work(task, say)


if __name__ == "__main__":
    main()
