"""Which videos a step is about, and which of them are guided: known on the host before the first step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sora_fast.diffusion.paths import NoisePath
from sora_fast.diffusion.samplers import Sampler
from sora_fast.diffusion.sampling import check_pair
from sora_fast.generation.tasks import Request
from sora_fast.packing import PackedLayout


@dataclass(frozen=True)
class Phase:
    """Steps that follow each other, about the same requests, of which the same are guided; both by number."""

    steps: range
    guided: tuple[int, ...]
    unguided: tuple[int, ...]

    @property
    def requests(self) -> tuple[int, ...]:
        """In the order of the state: what is guided comes first."""
        return self.guided + self.unguided

    def tokens(self, lengths: Sequence[int]) -> int:
        """That the network sees in a step, of requests of so many tokens: those that are guided twice."""
        return sum(lengths[i] for i in (*self.requests, *self.guided))


@dataclass(frozen=True, eq=False)
class Plan:
    """What will be done for some requests.

    counts: steps of each. sigmas: noise level of each at each of its steps, then 0: [K + 1, S] float64, K the most of
    `counts`. phases: all steps, in order.
    """

    requests: tuple[Request, ...]
    counts: tuple[int, ...]
    sigmas: Tensor
    phases: tuple[Phase, ...]

    @staticmethod
    def of(
        requests: Sequence[Request],
        layout: PackedLayout,
        path: NoisePath,
        sampler: Sampler,
        *,
        steps: int,
        guidance: bool = True,
    ) -> "Plan":
        """layout: of the requests, a segment each. steps: of those that do not say. guidance: whether the model knows
        any. TypeError for a sampler that cannot follow the path, ValueError for no steps."""
        check_pair(path, sampler)
        if steps < 1:
            raise ValueError(f"steps: {steps}; it must be at least 1")
        counts = [steps if request.steps is None else request.steps for request in requests]
        sigmas = _levels(counts, layout, path, sampler.spacing)
        return Plan(tuple(requests), tuple(counts), sigmas, tuple(_phases(requests, counts, sigmas, guidance)))

    @property
    def steps(self) -> int:
        """Of the request that takes most."""
        return max(self.counts)

    def tokens(self, lengths: Sequence[int]) -> int:
        """That the network sees in all steps, of requests of so many tokens; a call a step."""
        return sum(phase.tokens(lengths) * len(phase.steps) for phase in self.phases)


def _levels(counts: Sequence[int], layout: PackedLayout, path: NoisePath, spacing: str) -> Tensor:
    table = torch.zeros(max(counts) + 1, len(counts), dtype=torch.float64, device=layout.device)
    for count in set(counts):
        of_count = path.sigmas(count, layout, spacing=spacing)
        own = [i for i, other in enumerate(counts) if other == count]
        table[: count + 1, own] = of_count[:, own]
    return table


def _phases(requests: Sequence[Request], counts: Sequence[int], sigmas: Tensor, guidance: bool) -> Iterator[Phase]:
    table = sigmas.tolist()

    def who(done: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        going = [i for i, count in enumerate(counts) if done < count]
        guided = [i for i in going if guidance and _is_guided(requests[i], table[done][i])]
        return tuple(guided), tuple(i for i in going if i not in guided)

    for (guided, unguided), steps in groupby(range(max(counts)), key=who):
        steps = list(steps)
        yield Phase(range(steps[0], steps[-1] + 1), guided, unguided)


def _is_guided(request: Request, sigma: float) -> bool:
    low, high = request.guidance_interval
    return request.guidance != 1 and low <= sigma <= high
