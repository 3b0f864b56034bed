"""When steps are left out because their loss or gradient is not finite: how many, and when it is enough.

The update itself is left out on the device (step.py). Here the host learns of it, `LAG` steps late on a GPU, so that it
waits for none: the same step on all workers, who decide the same.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from sora_fast.training.step import NoisyPack

LAG = 4


class Diverged(FloatingPointError):
    """`limit` steps in a row were left out. step, packs: the first of them, and what this worker computed it on."""

    def __init__(self, step: int, last: int, packs: Sequence[NoisyPack]) -> None:
        super().__init__(
            f"the loss or its gradient is not finite in {last - step + 1} steps in a row, {step} to {last}; none "
            "of them has changed the weights"
        )
        self.step, self.packs = step, packs


class Guard:
    """Raises `Diverged` after `limit` steps in a row that were left out."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: deque[tuple[int, Sequence[NoisyPack], Tensor, torch.cuda.Event | None]] = deque()
        self._row: list[tuple[int, Sequence[NoisyPack]]] = []

    def watch(self, step: int, packs: Sequence[NoisyPack], bad: Tensor) -> None:
        """Take note of a step. bad: [] bool, on any device."""
        self._waiting.append((step, packs, *_fetched(bad)))
        self.settle(LAG if bad.is_cuda else 0)

    def settle(self, left: int = 0) -> None:
        """Look at all steps but the newest `left`."""
        while len(self._waiting) > left:
            step, packs, flag, ready = self._waiting.popleft()
            if ready is not None:
                ready.synchronize()
            # The packs of the first alone are kept: those behind it have the same weights.
            self._row = [*self._row, (step, () if self._row else packs)] if flag.item() else []
            if len(self._row) >= self.limit:
                raise Diverged(self._row[0][0], step, self._row[0][1])


def _fetched(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """On the way to the host, and the event that it is there."""
    if not flag.is_cuda:
        return flag, None
    host = torch.empty_like(flag, device="cpu", pin_memory=True)
    host.copy_(flag, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready
