"""A step of the sampler as a function of tensors that keep their sizes: run as it is, or replayed as a graph."""

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sora_fast.diffusion.paths import NoisePath
from sora_fast.diffusion.samplers import Prediction
from sora_fast.diffusion.sampling import Descent
from sora_fast.generation.pack import Network, Seen
from sora_fast.generation.room import Room
from sora_fast.graphs import Graph, Recorder
from sora_fast.packing._bundle import TensorBundle

log = logging.getLogger(__name__)

State = tuple[Tensor, Tensor | None]
# Graphs that are kept, each with inputs and outputs of its own; the memory between is shared.
_MOST = 32
# Of the largest number: two bits of bfloat16, while what a graph has missed differs by all of it.
_ROUNDING = 2**-6


@dataclass(frozen=True, eq=False)
class StepInputs(TensorBundle):
    """x: [P], the state. numbers: [n, S], of the sampler. tables: of the step's level and, where it looks ahead, of the
    next one, [T, M, C] each. memory, noise: [P], where the sampler takes them."""

    x: Tensor
    numbers: Tensor
    tables: tuple[Tensor, ...]
    seen: Seen
    descent: Descent
    memory: Tensor | None = None
    noise: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """StepInputs → the state after the step, and what the next one remembers: model, guidance, solver, nothing else.

    network: as `SoraDiT.denoise`. last: for all requests.
    """

    network: Network
    path: NoisePath
    last: bool

    def __call__(self, inputs: StepInputs) -> State:
        def evaluate(x: Tensor, ahead: int) -> Prediction:
            return inputs.seen.predict(x, inputs.tables[ahead], self.path, self.network)

        return inputs.descent.step(
            inputs.x, inputs.numbers, evaluate, inputs.memory, last=self.last, fresh_noise=lambda: inputs.noise
        )


class StepGraphs:
    """The graphs of an engine: one for each room of a pack and form of a step."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._graphs: dict[Any, Graph[StepInputs] | Step] = {}

    def take(self, step: Step, room: Room, inputs: StepInputs, used: int) -> tuple[State, bool]:
        """`step(inputs)`, and whether it was a replay. used: elements of the state that belong to a video."""
        key = step, inputs.descent.sampler, room, inputs.memory is None
        taken = self._graphs.pop(key, None) or Graph(step, self._recorder)
        self._graphs[key] = taken
        if len(self._graphs) > _MOST:
            del self._graphs[next(iter(self._graphs))]  # that of the longest ago
        state = taken(inputs)
        if not isinstance(taken, Graph) or not taken.replays:
            return state, False
        # The first replay has the inputs that were captured, the second others: if it misses those, it is seen here.
        if taken.replays == 2 and not _alike(state[0][:used], (plain := step(inputs))[0][:used]):
            log.warning("a CUDA graph of the sampler's step gave other videos than the step itself: it is not used")
            self._graphs[key] = step
            return plain, False
        return state, True


def _alike(one: Tensor, other: Tensor) -> bool:
    """But for rounding: a product may be summed in another order. Waits for the device."""
    return bool((one - other).abs().max() <= _ROUNDING * other.abs().max())
