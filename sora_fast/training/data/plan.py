"""Which samples make which pack: decided in one place, in order, and gone on with where it was left."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from sora_fast.models.codecs import LatentSpec
from sora_fast.packing import kept_tokens, token_grid
from sora_fast.packing.order import Grid
from sora_fast.packing.packer import PackRules, StreamingPacker
from sora_fast.training.data.batch import BatchConfig
from sora_fast.training.data.sources import Source, sample_name
from sora_fast.training.distributed import World

# What a random draw is for: no two purposes share random numbers.
ORDER, CAPTION, CLIP, DROP, KEEP = range(5)

# Steps from the loss of a sample to the first that is planned without it: more than are ever planned ahead.
LAG = 256


@dataclass(frozen=True)
class Pack:
    """What goes into a batch, before anything of it is read.

    positions: of the samples in the stream; indices: of the same samples in the source; kept: how many of their tokens
        stay, where some are dropped.
    skipped: samples longer than the capacity, so far. resume: what `Plan.load_state_dict` takes to go on after it.
    """

    positions: tuple[int, ...]
    indices: tuple[int, ...]
    kept: tuple[int, ...] | None
    skipped: int
    resume: dict[str, Any]


class Plan:
    """The packs of a source, one after the other, for ever; see `Batches`, whose arguments these are.

    Costs little: nothing is read of a source that knows the shapes of its samples.
    """

    def __init__(
        self,
        source: Source,
        config: BatchConfig,
        *,
        patch_size: Grid,
        spec: LatentSpec,
        seed: int = 0,
        world: World | None = None,
    ) -> None:
        self.source, self.seed, self.world = source, seed, world or World()
        rules = PackRules(config.capacity, config.max_segments, oversized=config.oversized)
        look_ahead = config.look_ahead * self.world.size
        self.packer = StreamingPacker(rules, look_ahead=look_ahead, ranks=self.world.size)
        # Packs are planned in a thread: what it exchanges must not meet what the training step does.
        self.measurers = World() if hasattr(source, "shape") else self.world.apart()
        self._grids: dict[int, Grid] = {}
        # The packs of all workers are planned by each: for 1,024 of them this is a third of the time.
        self._grid_of = lru_cache(maxsize=1 << 16)(partial(_grid_of, spec, patch_size))
        self.position = 0
        self._steps = 0
        # What is not planned with any more, and from which step on.
        self._left_out: dict[str, int] = {}
        # With dropping: what the samples that are held will keep, by position.
        self._drop, self._kept = config.drop, {}
        self._fingerprint: str | None = getattr(source, "fingerprint", None)
        self._epoch: tuple[int, np.ndarray] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, what waits in the packer, and of which source that is true; JSON-able."""
        state = {"position": self.position, "packer": self.packer.state_dict(), "source": self._fingerprint}
        state |= {"steps": self._steps, "left_out": dict(self._left_out)}
        return state if self._drop is None else state | {"kept": list(self._kept.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. ValueError if the source has another fingerprint now."""
        if state.get("source") != self._fingerprint:
            raise ValueError(
                f"source: {self._fingerprint}, but it was {state.get('source')}; files, their sizes or their captions "
                "have changed. Put back what was there, or start a new run"
            )
        self.position = state["position"]
        self._steps, self._left_out = state.get("steps", 0), dict(state.get("left_out", {}))
        self._kept = dict(map(tuple, state.get("kept", ())))
        packer = state["packer"]
        self.packer.load_state_dict(packer if packer["ranks"] == self.world.size else self._repacked(packer))

    def leave_out(self, name: str, after: int) -> dict[str, int]:
        """Plan without the samples of a name, from `LAG` steps after the step `after` on; all that is left out so.

        What was planned ahead stays as it is: how much that is depends on who asks. Where several train together they
        are left in, since not all know of it.
        """
        if self.world.size == 1:
            self._left_out[name] = after + LAG
        return dict(self._left_out)

    def __iter__(self) -> Iterator[Pack]:
        while True:
            packs = self.next_packs()
            kept = None if self._drop is None else [[self._kept.pop(position) for position in pack] for pack in packs]
            positions = packs[self.world.rank]
            yield Pack(
                tuple(positions),
                tuple(map(self.index, positions)),
                kept and tuple(kept[self.world.rank]),
                self.packer.skipped,
                self.state_dict(),
            )

    def next_packs(self) -> list[list[int]]:
        """Positions in the stream of the samples of each worker's next pack."""
        while True:
            planned = not self._is_left_out(self.position)
            packs = self.packer.push(self.position, self._length(self.position)) if planned else []
            self.position += 1
            if packs:
                self._steps += 1
                return packs
            self._check_progress()

    def index(self, position: int) -> int:
        """The sample at a position of the stream."""
        if not hasattr(self.source, "__len__"):
            return position
        epoch, place = divmod(position, len(self.source))
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng((self.seed, ORDER, epoch))
            self._epoch = epoch, random.permutation(len(self.source))
        return int(self._epoch[1][place])

    def _is_left_out(self, position: int) -> bool:
        if not self._left_out:
            return False
        return self._steps >= self._left_out.get(sample_name(self.source, self.index(position)), math.inf)

    def _repacked(self, state: dict[str, Any]) -> dict[str, Any]:
        """For a run that goes on with another number of workers: what was packed waits again, first in line."""
        packed = [position for pack in state["ready"] for position in pack]
        if self._drop is None:
            lengths = [math.prod(grid) for grid in self._measured(packed)]
        else:
            lengths = [self._kept[position] for position in packed]
        waiting = [*zip(packed, lengths, strict=True), *state["waiting"]]
        return state | {"ranks": self.world.size, "ready": [], "waiting": waiting, "left_over": len(packed)}

    def _length(self, position: int) -> int:
        """Tokens that are left of the sample at a position of the stream."""
        grid = self._grid(position)
        if self._drop is None:
            return math.prod(grid)
        rates = self._drop.rates([grid], np.random.default_rng((self.seed, DROP, position)), step=self._steps)
        self._kept[position] = int(kept_tokens([grid], rates)[0])
        return self._kept[position]

    def _grid(self, position: int) -> Grid:
        """The token grid of the sample at a position of the stream."""
        if hasattr(self.source, "shape"):
            return self._grid_of(tuple(self.source.shape(self.index(position))))
        if (index := self.index(position)) not in self._grids:
            coming = range(position, position + self.measurers.size)
            if not hasattr(self.source, "__len__"):  # an endless stream asks for none twice
                self._grids.clear()
            self._grids.update(zip(map(self.index, coming), self._measured(coming), strict=True))
        return self._grids[index]

    def _measured(self, positions: Sequence[int]) -> list[Grid]:
        """Token grids of several samples, which may have to be decoded for it: each worker takes a share of them."""
        indices = [self.index(position) for position in self.measurers.shared_out(positions)]
        shape = getattr(self.source, "shape", lambda index: self.source[index].video.shape)
        return self.measurers.joint([self._grid_of(tuple(shape(index))) for index in indices])

    def _check_progress(self) -> None:
        if hasattr(self.source, "__len__") and self.packer.skipped >= len(self.source) == self.position:
            raise ValueError(
                f"all {len(self.source)} samples are longer than the capacity of {self.packer.rules.capacity} tokens; "
                "raise the capacity, or make the samples smaller"
            )


def _grid_of(spec: LatentSpec, patch_size: Grid, shape: tuple[int, ...]) -> Grid:
    return token_grid(spec.latent_shape(*shape[1:]), patch_size)
