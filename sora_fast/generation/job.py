"""The steps of one call of the engine: prepared, taken, finished."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sora_fast.diffusion.noise import noise_like
from sora_fast.diffusion.paths import NoisePath
from sora_fast.diffusion.pixels import token_to_pixels
from sora_fast.diffusion.samplers import Sampler
from sora_fast.diffusion.sampling import Descent
from sora_fast.generation.latency import Latency
from sora_fast.generation.pack import Modulations, Pack
from sora_fast.generation.phases import Phase, Plan
from sora_fast.generation.room import Room
from sora_fast.generation.step import State, Step, StepGraphs, StepInputs
from sora_fast.generation.step_cache import FirstBlockCache, check_cache
from sora_fast.generation.tasks import PackedRequests
from sora_fast.models.sora_dit import Prepared, SoraDiT
from sora_fast.models.text import PackedText
from sora_fast.packing import RaggedLatents


@dataclass(frozen=True, eq=False)
class _Stage:
    """A phase and all that its steps need. numbers: of each, [K, n, S]."""

    phase: Phase
    pack: Pack
    modulations: Modulations
    descent: Descent
    numbers: Tensor


class Job:
    """All videos of a plan, from noise to data: what is made once, every step, and the end.

    packed: the requests, in the plan's order. text: their prompts, and behind them that of none; None: the model reads
    no text. latency: takes down what the network does. cache: threshold, see `FirstBlockCache`. graphs: replay the
    steps; not those with a cache, whose decisions are the host's.
    """

    def __init__(
        self,
        model: SoraDiT,
        plan: Plan,
        packed: PackedRequests,
        text: PackedText | None,
        path: NoisePath,
        sampler: Sampler,
        *,
        latency: Latency,
        cache: float = 0.0,
        graphs: StepGraphs | None = None,
    ) -> None:
        check_cache(cache, min(plan.counts))
        self.model, self.plan, self.packed, self.text = model, plan, packed, text
        self.path, self.sampler, self.latency = path, sampler, latency
        self.cache = FirstBlockCache(model, cache) if cache else None
        self.graphs = None if cache else graphs
        self._generators = [torch.Generator().manual_seed(request.seed) for request in plan.requests]
        self._sizes = [video.numel() for video in packed.data.to_list()]
        # Of every request: its state, and what the sampler remembers of its last step.
        self._x = self._split(noise_like(packed.data, self._generators))
        self._memory: list[Tensor] | None = None
        self._stages = list(self._prepared())

    def steps(self) -> Iterator[int]:
        """Take all steps; gives the number of those done, after each."""
        for stage in self._stages:
            requests = stage.phase.requests
            size = stage.pack.state.flat.shape[0]
            x = _chosen(self._x, requests, size)
            memory = None if self._memory is None else _chosen(self._memory, requests, size)
            if self.cache is not None:
                self.cache.forget()
            for place, done in enumerate(stage.phase.steps):
                last = all(done + 1 == self.plan.counts[i] for i in requests)
                x, memory = self._take(stage, place, (x, memory), last)
                yield done + 1
            self._keep(stage, stage.descent.given(x), memory)

    def finish(self) -> list[Tensor]:
        """The latents (C, T, H, W) of every request."""
        return self.packed.data.with_flat(torch.cat(self._x)).to_list()

    def _prepared(self) -> Iterator[_Stage]:
        numbers = self.sampler.numbers(self.path, self.plan.sigmas)
        fixed = None
        if self.packed.given or self.graphs is not None:
            where = (self.packed.layout, self.model.config.patch_size, self.packed.data)
            fixed = self._split(token_to_pixels(self.packed.clean, *where))
        packs: dict[tuple[tuple[int, ...], ...], Pack] = {}
        for phase in self.plan.phases:
            requests, steps = list(phase.requests), phase.steps
            if (phase.guided, phase.unguided) not in packs:
                packs[phase.guided, phase.unguided] = self._pack(phase)
            pack = packs[phase.guided, phase.unguided]
            # A sampler that looks ahead calls the model at the level behind its last step, too.
            levels = self.plan.sigmas[steps.start : steps.stop + self.sampler.looks_ahead]
            mine = None if fixed is None else _chosen(fixed, requests, pack.state.flat.shape[0])
            descent = Descent.of(pack.state, self.sampler, data=pack.state.flat, fixed=mine)
            ends = self.plan.sigmas[steps.start + 1 : steps.stop + 1, requests] if self.sampler.tells_end else None
            modulations = pack.modulations(levels[:, requests], len(phase.guided), ends)
            own = numbers[steps.start : steps.stop, :, requests].to(pack.state.flat.dtype)
            own = pad(own, (0, pack.state.max_segments - len(requests)))
            yield _Stage(phase, pack, modulations, descent, own)

    def _pack(self, phase: Phase) -> Pack:
        texts = [*phase.requests, *[len(self.plan.requests)] * len(phase.guided)]
        room = None if self.graphs is None else self._room(phase, texts)
        text = self.text
        if text is not None:
            # One segment would be a size of its own to torch.compile.
            sizes = (None, max(2, len(texts))) if room is None else (room.text, room.segments)
            text = text.take(texts, capacity=sizes[0], max_segments=sizes[1])
        guidance = [self.plan.requests[i].guidance for i in phase.guided]
        return Pack.of(self.model, self.packed.take(phase.requests), text, guidance, room)

    def _room(self, phase: Phase, texts: Sequence[int]) -> Room:
        lengths = self.packed.layout.cu_seqlens.diff().tolist()
        words = 0
        if self.text is not None:
            counts = self.text.layout.cu_seqlens.diff().tolist()
            words = sum(counts[i] for i in texts)
        return Room.fitting(tokens=phase.tokens(lengths), segments=len(texts), text=words)

    def _take(self, stage: _Stage, place: int, state: State, last: bool) -> State:
        """A step of a stage, as it is or as a graph."""
        pack, (x, memory) = stage.pack, state
        noise = None
        if self.sampler.draws_noise and not last:
            noise = noise_like(pack.state, [self._generators[i] for i in stage.phase.requests])
        ahead = self.sampler.looks_ahead and not last
        tables = tuple(stage.modulations[place + i] for i in range(2 if ahead else 1))
        inputs = StepInputs(x, stage.numbers[place], tables, pack.seen, stage.descent, memory, noise)
        self.latency.tokens += pack.tokens * len(tables)
        last = last and self.sampler.ends_otherwise
        if pack.room is None:
            return Step(self._network, self.path, last)(inputs)
        began = time.perf_counter()
        step = Step(self.model.denoise, self.path, last)
        state, replayed = self.graphs.take(step, pack.room, inputs, sum(self._sizes[i] for i in stage.phase.requests))
        self.latency.network += time.perf_counter() - began
        self.latency.calls += len(tables)
        self.latency.replayed += replayed
        return state

    def _network(self, latents: RaggedLatents, prepared: Prepared) -> RaggedLatents:
        began = time.perf_counter()
        output = self.model.denoise(latents, prepared, trunk=None if self.cache is None else self.cache.trunk)
        self.latency.network += time.perf_counter() - began
        self.latency.calls += 1
        self.latency.skipped = 0 if self.cache is None else self.cache.skipped
        return output

    def _keep(self, stage: _Stage, x: Tensor, memory: Tensor | None) -> None:
        """What a stage made, for the next one, where other requests may go on, or in another order."""
        sizes = [self._sizes[i] for i in stage.phase.requests]
        for request, part in zip(stage.phase.requests, x[: sum(sizes)].split(sizes), strict=True):
            self._x[request] = part
        if memory is not None:
            self._memory = self._memory or list(self._x)
            for request, part in zip(stage.phase.requests, memory[: sum(sizes)].split(sizes), strict=True):
                self._memory[request] = part

    def _split(self, flat: Tensor) -> list[Tensor]:
        return list(flat.split(self._sizes))


def _chosen(parts: Sequence[Tensor], requests: Sequence[int], size: int) -> Tensor:
    """Of some requests, one after the other, then zeros: [size]."""
    chosen = torch.cat([parts[i] for i in requests])
    return pad(chosen, (0, size - chosen.shape[0]))
