"""First-block cache: a step whose first block does what it did before does without the others.

What the first block adds to the tokens tells how far the network's input has moved. Where that has hardly changed since
the last step that ran all blocks, what these added then is added again (the idea of ParaAttention's first-block cache,
after TeaCache, arXiv 2411.19108).
"""

from torch import Tensor

from sora_fast.models.sora_dit import Prepared, SoraDiT
from sora_fast.ops.adaln import adaln
from sora_fast.ops.segment_mean import segment_mean

# A chain that is short already takes steps too long for what one says to serve the next.
LEAST_STEPS = 8


class FirstBlockCache:
    """Takes the place of `SoraDiT.trunk` for the steps of one pack.

    threshold: skip where, in every segment, the mean change of what the first block adds is less than this share of it.
    skipped, calls: so far. Each decision waits for the device, so a graph cannot capture it.
    """

    def __init__(self, model: SoraDiT, threshold: float) -> None:
        self.model, self.threshold = model, threshold
        self.skipped = self.calls = 0
        self._first: Tensor | None = None
        self._others: Tensor | None = None

    def forget(self) -> None:
        """Of another pack nothing is known yet."""
        self._first = self._others = None

    def trunk(self, x: Tensor, h: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """As `SoraDiT.trunk`."""
        self.calls += 1
        after, h = self.model.trunk(x, h, prepared, slice(0, 1))
        first = after - x
        if self._first is not None and self._alike(first, prepared):
            self.skipped += 1
            x = after + self._others
            eps = self.model.config.eps
            return x, adaln(x, *prepared.modulations[-1], prepared.shared.rows, eps=eps)
        x, h = self.model.trunk(after, h, prepared, slice(1, None))
        self._first, self._others = first, x - after
        return x, h

    def _alike(self, first: Tensor, prepared: Prepared) -> bool:
        sizes = [
            segment_mean(part.abs(), prepared.shared.layout).mean(1) for part in (first - self._first, self._first)
        ]
        return bool((sizes[0] <= self.threshold * sizes[1]).all())


def check_cache(threshold: float, steps: int) -> None:
    """ValueError for a threshold that means nothing, or steps too few for any."""
    if not 0 <= threshold < 1:
        raise ValueError(f"cache: {threshold}; it must be a share from 0, which is none, to below 1")
    if threshold and steps < LEAST_STEPS:
        raise ValueError(
            f"cache: {threshold} with {steps} steps; so few differ too much from each other, it takes {LEAST_STEPS}"
        )
