"""From a source of samples to packed batches of static capacity, one after the other, for ever."""

import logging
import math
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from sora_fast.models.codecs import Codec, LatentSpec
from sora_fast.models.text import TextEncoder
from sora_fast.packing import PackedLayout, RaggedLatents, token_grid
from sora_fast.packing._bundle import TensorBundle
from sora_fast.packing.packer import PackRules, StreamingPacker
from sora_fast.training.data import Sample, Source
from sora_fast.training.distributed import World
from sora_fast.training.interruption import Stopped

Item = TypeVar("Item")

log = logging.getLogger(__name__)

# What a random draw is for: no two purposes share random numbers.
_ORDER, _CAPTION = 0, 1


@dataclass(frozen=True, eq=False)
class Prompts(TensorBundle):
    """What a text encoder takes: ids [Nt], and their layout of S segments."""

    ids: Tensor
    layout: PackedLayout


@dataclass(frozen=True, eq=False)
class Batch(TensorBundle):
    """Packed samples. The tensors' shapes never change from batch to batch.

    latents, layout: S segments in N tokens. prompts: the captions, tokenized; None without a text encoder.
    useful: tokens that are no padding. skipped: samples longer than the capacity, so far.
    resume: what `Batches.load_state_dict` takes to go on after this batch; JSON-able.
    """

    latents: RaggedLatents
    layout: PackedLayout
    prompts: Prompts | None
    useful: int
    skipped: int
    resume: dict[str, Any]


@dataclass(frozen=True)
class BatchConfig:
    """How samples become batches.

    capacity: tokens in a batch. max_segments: samples in a batch, at most.
    text_capacity: text tokens in a batch; where captions are longer together, the longest are cut, and the log says
        so once.
    look_ahead: samples a worker that the packer chooses from: more of it, less padding, and packs of more equal cost
        (of 8 or 64 workers' time 5% goes by in waiting for the slowest with 16, 2% with 32, 0.4% with 128).
    order: "tiled" or "raster", the token order.
    caption_dropout: share of the samples whose caption is left out, for classifier-free guidance.
    oversized: "raise" an error for a sample longer than the capacity, or "skip" and count it.
    """

    capacity: int = 4096
    max_segments: int = 32
    text_capacity: int = 2048
    look_ahead: int = 128
    order: str = "tiled"
    caption_dropout: float = 0.1
    oversized: str = "raise"


class Batches:
    """An endless iterator of `Batch`, the same one for the same arguments.

    codec: what makes the samples' latents. text: what tokenizes the captions, if anything.
    world: the workers whose packs are planned together, a step at a time, so that their costs are alike; each gets its
        own, and all go through the stream in step.

    A data set (a source with `__len__`) is gone through in a new random order every epoch. Samples are fetched twice,
    once for their length and once for their pixels, so that what waits in the packer costs no memory; the workers share
    out the first, and a source with a method `shape(index) -> (C, T, H, W)` spares it.
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
    ) -> None:
        self.source, self.config, self.codec, self.text = source, config, codec, text
        self.patch_size, self.seed, self.world = patch_size, seed, world or World()
        rules = PackRules(config.capacity, config.max_segments, oversized=config.oversized)
        look_ahead = config.look_ahead * self.world.size
        self.packer = StreamingPacker(rules, look_ahead=look_ahead, ranks=self.world.size)
        # Batches are made in a thread: what it exchanges must not meet what the training step does.
        self._measurers = World() if hasattr(source, "shape") else self.world.apart()
        self._lengths: dict[int, int] = {}
        # The packs of all workers are planned by each: for 1,024 of them this is a third of the time.
        self._tokens = lru_cache(maxsize=1 << 16)(partial(_count_tokens, codec.spec, patch_size))
        self.position = 0
        self._fingerprint: str | None = getattr(source, "fingerprint", None)
        self._epoch: tuple[int, np.ndarray] | None = None
        self._warned_of_cut = False

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, what waits in the packer, and of which source that is true; JSON-able."""
        return {"position": self.position, "packer": self.packer.state_dict(), "source": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. ValueError if the source has another fingerprint now."""
        if state.get("source") != self._fingerprint:
            raise ValueError(
                f"source: {self._fingerprint}, but it was {state.get('source')}; files, their sizes or their captions "
                "have changed. Put back what was there, or start a new run"
            )
        self.position = state["position"]
        packer = state["packer"]
        self.packer.load_state_dict(packer if packer["ranks"] == self.world.size else self._repacked(packer))

    def _repacked(self, state: dict[str, Any]) -> dict[str, Any]:
        """For a run that goes on with another number of workers: what was packed waits again, first in line."""
        packed = [position for pack in state["ready"] for position in pack]
        waiting = [*zip(packed, self._measured(packed), strict=True), *state["waiting"]]
        return state | {"ranks": self.world.size, "ready": [], "waiting": waiting, "left_over": len(packed)}

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._batch(self.next_packs()[self.world.rank])

    @property
    def exchanges(self) -> bool:
        """Whether making batches takes exchanges with the other workers, as measuring samples together does."""
        return self._measurers.size > 1

    def next_packs(self) -> list[list[int]]:
        """Positions in the stream of the samples of each worker's next pack."""
        while True:
            packs = self.packer.push(self.position, self._length(self.position))
            self.position += 1
            if packs:
                return packs
            self._check_progress()

    def _batch(self, positions: Sequence[int]) -> Batch:
        c = self.config
        encoded = [self._encode(position) for position in positions]
        # Equal lengths side by side: on a CPU they share one call of attention.
        encoded.sort(key=lambda item: math.prod(token_grid(item[0].shape, self.patch_size)))
        videos, captions = [list(column) for column in zip(*encoded, strict=True)]
        grids = [token_grid(video.shape, self.patch_size) for video in videos]
        elements = c.capacity * self.codec.spec.channels * math.prod(self.patch_size)
        layout = PackedLayout.from_grids(grids, order=c.order, capacity=c.capacity, max_segments=c.max_segments)
        return Batch(
            RaggedLatents.from_list(videos, capacity=elements, max_segments=c.max_segments),
            layout,
            self._prompts(captions),
            useful=sum(map(math.prod, grids)),
            skipped=self.packer.skipped,
            resume=self.state_dict(),
        )

    def _encode(self, position: int) -> tuple[Tensor, str]:
        """Latents and caption of the sample at a position of the stream."""
        sample = self.source[self._index(position)]
        return self.codec.encode(sample.video), self._caption(sample, position)

    def _length(self, position: int) -> int:
        """Tokens of the sample at a position of the stream."""
        if hasattr(self.source, "shape"):
            return self._tokens(tuple(self.source.shape(self._index(position))))
        if (index := self._index(position)) not in self._lengths:
            coming = range(position, position + self._measurers.size)
            if not hasattr(self.source, "__len__"):  # an endless stream asks for none twice
                self._lengths.clear()
            self._lengths.update(zip(map(self._index, coming), self._measured(coming), strict=True))
        return self._lengths[index]

    def _measured(self, positions: Sequence[int]) -> list[int]:
        """Tokens of several samples, which may have to be decoded for it: each worker takes a share of them."""
        indices = [self._index(position) for position in self._measurers.shared_out(positions)]
        shape = getattr(self.source, "shape", lambda index: self.source[index].video.shape)
        return self._measurers.joint([self._tokens(tuple(shape(index))) for index in indices])

    def _index(self, position: int) -> int:
        """The sample at a position of the stream."""
        if not hasattr(self.source, "__len__"):
            return position
        epoch, place = divmod(position, len(self.source))
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng((self.seed, _ORDER, epoch))
            self._epoch = epoch, random.permutation(len(self.source))
        return int(self._epoch[1][place])

    def _caption(self, sample: Sample, position: int) -> str:
        dropped = np.random.default_rng((self.seed, _CAPTION, position)).random()
        return "" if dropped < self.config.caption_dropout else sample.caption

    def _prompts(self, captions: list[str]) -> Prompts | None:
        if self.text is None:
            return None
        c, longest = self.config, max(map(len, captions))
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

    def _check_progress(self) -> None:
        if hasattr(self.source, "__len__") and self.packer.skipped >= len(self.source) == self.position:
            raise ValueError(
                f"all {len(self.source)} samples are longer than the capacity of {self.config.capacity} tokens; "
                "raise the capacity, or make the samples smaller"
            )


def _count_tokens(spec: LatentSpec, patch_size: tuple[int, int, int], shape: tuple[int, ...]) -> int:
    return math.prod(token_grid(spec.latent_shape(*shape[1:]), patch_size))


def prefetch(items: Iterator[Item], depth: int = 2, *, in_step: bool = False) -> Iterator[Item]:
    """The same items in the same order, made up to `depth` ahead in a thread that ends with the generator.

    in_step: making them takes exchanges with other workers, of whom each is to make the same number: `depth` more than
        were taken, also where the generator ends before.
    """
    made: queue.SimpleQueue[tuple[Item | None, BaseException | None]] = queue.SimpleQueue()
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def work() -> None:
        try:
            while wanted.get() and (in_step or not ending.is_set()):
                made.put((next(items), None))
        except BaseException as error:
            made.put((None, error))

    ending = threading.Event()
    for _ in range(depth):
        wanted.put(True)
    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    left_alone = False
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            wanted.put(True)
            yield item
    except Stopped:
        left_alone = True  # it may be stuck in the very item that was waited for
        raise
    finally:
        ending.set()
        wanted.put(False)
        if not left_alone:
            thread.join()
