"""A process of the GPU suite: does the items of one task, and may be lost in doing so.

    python -m benchmarks.worker JSON

JSON: see benchmarks/tasks.py. Tells its parent as sora_fast/proof/child.py does; what an item found stands beside its
verdict, which is "passed" unless something was raised.
"""

import faulthandler
import sys
import traceback
from importlib import import_module
from typing import TYPE_CHECKING

from benchmarks import _checkout
from benchmarks.tasks import Task

if TYPE_CHECKING:
    import torch

    from sora_fast.proof.telling import Say


def work(task: Task, say: "Say") -> None:
    """Do all items; stops after the first that leaves a GPU behind which does not answer any more."""
    device = _device(task.device)
    do = import_module(task.step).step(device, **task.options)
    say({"ready": len(task.names)})
    for name in task.names:
        say({"begins": name})
        print(f"--- {name}", file=sys.stderr, flush=True)
        found, reason = None, ""
        try:
            found = do(name)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"[:2000]
        say({"ends": name, "verdict": "failed" if reason else "passed", "reason": reason, "found": found})
        if reason and not _answers(device):
            return


def _device(name: str) -> "torch.device":
    import torch

    if name != "any":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _answers(device: "torch.device") -> bool:
    """Whether the device still computes: after an illegal access nothing does in this process."""
    import torch

    try:
        return bool((torch.ones(8, device=device) + 1).sum().item() == 16)
    except Exception:
        return False


def main() -> None:
    task = Task.read(sys.argv[1])
    _checkout.make_importable()
    from sora_fast.proof.telling import telling

    # Should nobody be there any more to end it.
    faulthandler.dump_traceback_later(task.seconds, exit=True)
    with telling() as say:
        work(task, say)


if __name__ == "__main__":
    main()
