"""From a source of samples to packed batches of static capacity, one after the other, for ever."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sora_fast.models.codecs import Codec
from sora_fast.models.text import TextEncoder
from sora_fast.training.data.batch import Batch, BatchConfig, Prompts
from sora_fast.training.data.making import Made, Maker
from sora_fast.training.data.plan import Plan
from sora_fast.training.data.pool import MakerPool
from sora_fast.training.data.sources import Source, sample_name
from sora_fast.training.distributed import World

log = logging.getLogger(__name__)


class Batches:
    """An endless iterator of `Batch`, the same one for the same arguments, whatever the number of workers.

    codec: what makes the samples' latents. text: what tokenizes the captions, if anything.
    world: the processes that train together, whose packs are planned together, a step at a time, so that their costs
        are alike; each gets its own, and all go through the stream in step.
    workers: processes that make batches (see pool.py); 0: they are made here, when they are asked for. The source
        must then be picklable (one with a memory of its own may have a method `divided(workers)`, which gives what each
        is to get), and a script that starts them needs `if __name__ == "__main__":`.

    A data set (a source with `__len__`) is gone through in a new random order every epoch. Samples are fetched twice,
    once for their length and once for their pixels, so that what waits in the packer costs no memory; those who train
    together share out the first, and a source with a method `shape(index) -> (C, T, H, W)` spares it.

    A sample that proves unusable (`UnusableSample`, or a worker that dies of it) is named in the log and left out from
    then on, with all of its file if the source has a method `name(index)`. For some time packs are still planned as if
    it was there, and its places stay empty (see `Plan.leave_out`).
    """

    def __init__(
        self,
        source: Source,
        config: BatchConfig,
        *,
        patch_size: tuple[int, int, int],
        codec: Codec,
        text: TextEncoder | None = None,
        seed: int = 0,
        world: World | None = None,
        workers: int = 0,
    ) -> None:
        self.config, self.text, self.workers = config, text, workers
        self.plan = Plan(source, config, patch_size=patch_size, spec=codec.spec, seed=seed, world=world)
        shared = source.divided(workers) if workers and hasattr(source, "divided") else source
        self.maker = Maker(shared, config, codec, patch_size, seed)
        # What proved unusable, with the reason.
        self.lost: dict[str, str] = {}
        self._left_out: dict[str, int] = {}
        self._noted: set[str] = set()
        self._step = 0
        self._warned_of_cut = False

    def state_dict(self) -> dict[str, Any]:
        """Where in the stream it is, and what is left out; JSON-able."""
        return self._state(self.plan.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. ValueError if the source has another fingerprint now."""
        self.plan.load_state_dict(state)
        self.lost = dict(state.get("lost", {}))
        self._left_out, self._step = dict(state.get("left_out", {})), state.get("steps", 0)

    def __iter__(self) -> Iterator[Batch]:
        if not self.workers:
            for pack in self.plan:
                yield self._finished(self.maker.make(pack, without=self.lost))
            return
        with contextlib.closing(MakerPool(self.maker, self.workers, self._lose)) as pool:
            for made in pool.made(self.plan, self.lost):
                yield self._finished(made)

    @property
    def exchanges(self) -> bool:
        """Whether making batches takes exchanges with those who train too, as measuring samples together does."""
        return self.plan.measurers.size > 1

    def _finished(self, made: Made) -> Batch:
        self._step = made.batch.resume["steps"]
        for name, reason in made.lost.items():
            self._lose(name, reason)
        for name, note in made.notes.items():
            if name not in self._noted:
                self._noted.add(name)
                log.warning("%s: %s", name, note)
        batch = made.batch
        return replace(
            batch,
            prompts=self._prompts(made.captions),
            skipped=batch.skipped + len(self.lost),
            resume=self._state(batch.resume),
        )

    def _state(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Of a plan as it was then, with what is lost now."""
        return plan | ({"lost": dict(self.lost), "left_out": dict(self._left_out)} if self.lost else {})

    def _lose(self, name: str, reason: str) -> None:
        if name not in self.lost:
            self.lost[name] = reason
            self._left_out = self.plan.leave_out(name, self._step)
            log.warning("left out from now on, %d so far: %s: %s", len(self.lost), name, reason)
            source = self.plan.source
            names = {sample_name(source, index) for index in range(len(source))} if hasattr(source, "__len__") else None
            if names is not None and names <= self.lost.keys():
                raise ValueError(f"nothing is left to train on; the last was {name}: {reason}")

    def _prompts(self, captions: list[str]) -> Prompts | None:
        if self.text is None:
            return None
        c, longest = self.config, max(map(len, captions), default=0)
        while longest and (tokens := self.text.tokenize(captions)[0].shape[0]) > c.text_capacity:
            self._warn_of_cut(tokens)
            longest = longest * 3 // 4
            captions = [caption[:longest] for caption in captions]
        return Prompts(*self.text.tokenize(captions, capacity=c.text_capacity, max_segments=c.max_segments))

    def _warn_of_cut(self, tokens: int) -> None:
        if not self._warned_of_cut:
            self._warned_of_cut = True
            log.warning(
                "the captions of a batch have %d tokens together, but text_capacity is %d: the longest are cut, and so "
                "are those of later batches",
                tokens,
                self.config.text_capacity,
            )
