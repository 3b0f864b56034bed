"""One warpgroup that has a multiprocessor to itself: what its waits keep from running at the same time."""

import re
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.pipes import Product, Rates, cycles
from benchmarks.sass import Instruction

_WARPS = 4
_WARM_UP, _MEASURED = 4, 4  # iterations


def cycles_alone(instructions: Sequence[Instruction], rates: Rates) -> float | None:
    """Cycles of one iteration in the steady state, at least; None if its products are not all HGMMA.

    Instructions are issued in order, each as soon as its pipe takes it, and are done at once: no latencies, no other
    warps. HGMMAs run behind, one after the other; a WARPGROUP.DEPBAR waits for all that were committed before it, but
    for the last groups, of which it says how many.
    """
    products = [Product.of(i) for i in instructions]
    if {product.op for product in products if product} != {"HGMMA"}:
        return None
    queued, now = 0.0, 0.0  # when the last product is done; when the next instruction may be issued
    free: dict[str, float] = defaultdict(float)
    groups: list[float] = []
    ends: list[float] = []
    costs = [cycles([i], warps=_WARPS, rates=rates) for i in instructions]
    for _ in range(_WARM_UP + _MEASURED):
        for i, product, cost in zip(instructions, products, costs, strict=True):
            if product:
                queued = max(queued, now) + product.cycles(rates)
                if "gsb0" in i.operands:
                    groups.append(queued)
                now += 1
            elif i.name.startswith("WARPGROUP.DEPBAR"):
                pending = int(re.search(r"0x([0-9a-f]+)", i.operands)[1], 16)
                now = max([now, *groups[: len(groups) - pending]]) + 1
            else:
                now = max([now, *(free[pipe] for pipe, used in cost.items() if used)])
                for pipe, used in cost.items():
                    free[pipe] = now + used
                now += 1
        ends.append(max(now, queued))
    return (ends[-1] - ends[_WARM_UP - 1]) / _MEASURED
