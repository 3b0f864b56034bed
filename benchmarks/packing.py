"""One data set in batches of one token budget: padded, in buckets, packed. What is computed in vain?

A token is *useful* if it shows a sample at the sample's own size, or smaller. Padding is not useful; of a sample that a
bucket enlarges, only as many tokens are as it had. What a bucket cuts off or shrinks away is computed by nobody:
`Tally.kept` says how much of the data set is left. Text and the making of the latents are left out.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sora_fast.packing.packer import PackRules, StreamingPacker

Grid = tuple[int, int, int]

# Height over width. Open-Sora 1.2 has fifteen from 0.39 to 2.10; these are the common ones, over the range of a Mix.
RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2.0)
# A bucket takes what has this share of its area, at least, and enlarges it (Open-Sora's `approx`).
_LEAST_AREA = 0.8
# As the trainer has it.
_LOOK_AHEAD = 128


@dataclass(frozen=True)
class Mix:
    """A made-up data set, by what its samples are drawn from.

    images: share of the samples that are images; the others are videos. image_area, video_area: least and most tokens
    of a frame; frames: of a video; all three log-uniform, as aspect ratios are from 1:2 to 2:1.
    """

    name: str
    images: float
    image_area: tuple[int, int] = (64, 1024)
    video_area: tuple[int, int] = (64, 400)
    frames: tuple[int, int] = (2, 16)

    def scaled(self, area: int, frames: int) -> "Mix":
        """The same mix of so many times larger frames, and of so many times longer videos."""
        image_area, video_area = ((area * low, area * high) for low, high in (self.image_area, self.video_area))
        least, most = self.frames
        return Mix(self.name, self.images, image_area, video_area, (frames * least, frames * most))

    def draw(self, count: int, *, longest: int, seed: int = 0) -> list[Grid]:
        """`count` token grids of at most `longest` tokens; larger ones are drawn anew, as what they are."""
        random = np.random.default_rng(seed)
        return [self._draw(random, is_image, longest) for is_image in random.random(count) < self.images]

    def _draw(self, random: np.random.Generator, is_image: bool, longest: int) -> Grid:
        while True:
            area = _log_uniform(random, *(self.image_area if is_image else self.video_area))
            frames = 1 if is_image else round(_log_uniform(random, *self.frames))
            grid = (frames, *_sides(area, _log_uniform(random, RATIOS[0], RATIOS[-1])))
            if math.prod(grid) <= longest:
                return grid


# By tokens, all are mostly video: an image has few.
MIXES = (Mix("image-heavy", 0.9), Mix("mixed", 0.5), Mix("video-heavy", 0.1))


@dataclass(frozen=True)
class Buckets:
    """What Open-Sora calls a bucket configuration: every area with every number of frames and every aspect ratio.

    areas: tokens of a frame, each 1.5 times the side of the one before (Open-Sora: 240p, 360p, 480p, 720p, 1080p);
    frames: each twice the one before (51, 102, 204, 408 there), and 1, which is for images alone.
    """

    areas: tuple[int, ...] = (64, 144, 324, 729)
    frames: tuple[int, ...] = (1, 2, 4, 8, 16)

    def scaled(self, area: int, frames: int) -> "Buckets":
        """For a `Mix` scaled alike."""
        return Buckets(tuple(area * a for a in self.areas), (1, *(frames * f for f in self.frames if f > 1)))

    def assign(self, grid: Grid, *, longest: int) -> Grid | None:
        """The bucket's token grid; None: no bucket takes the sample, which is then left out.

        Open-Sora's rule: of the areas the largest that the sample fills to 80%, of the frames the most that it has, of
        the aspect ratios the nearest. A bucket of more than `longest` tokens does not exist: the next smaller area.
        """
        frames, height, width = grid
        fitting = [f for f in self.frames if f <= frames and (f == 1) == (frames == 1)]
        ratio = min(RATIOS, key=lambda r: abs(r - height / width))
        for area in sorted(self.areas, reverse=True):
            bucket = (max(fitting, default=0), *_sides(area, ratio))
            if height * width >= _LEAST_AREA * area and 0 < math.prod(bucket) <= longest:
                return bucket
        return None


@dataclass(frozen=True)
class Batch:
    """One step. grids: of the segments that are computed; capacity: tokens that are computed; useful: see above."""

    grids: tuple[Grid, ...]
    capacity: int
    useful: int


@dataclass(frozen=True)
class Tally:
    """Of a whole data set. padding: share of what is computed that is not useful; kept: useful, as a share of the data
    set; dropped: share of the samples that are in no batch."""

    padding: float
    kept: float
    dropped: float

    @staticmethod
    def of(batches: Sequence[Batch], grids: Sequence[Grid]) -> "Tally":
        useful, samples = sum(b.useful for b in batches), sum(len(b.grids) for b in batches)
        computed, there = sum(b.capacity for b in batches), sum(map(math.prod, grids))
        return Tally(1 - useful / computed, useful / there, 1 - samples / len(grids))


Way = Callable[[Sequence[Grid], int, Buckets], Iterator[Batch]]


def padded(grids: Sequence[Grid], budget: int, buckets: Buckets) -> Iterator[Batch]:
    """Samples as they come, as many as `budget` tokens hold once each is padded to the longest of its batch."""
    batch: list[Grid] = []
    for grid in grids:
        if (len(batch) + 1) * max(map(math.prod, [*batch, grid])) > budget:
            yield _padded(batch)
            batch = []
        batch.append(grid)
    if batch:
        yield _padded(batch)


def bucketed(grids: Sequence[Grid], budget: int, buckets: Buckets) -> Iterator[Batch]:
    """Samples resized and cropped to their bucket; a batch, of as many as fit `budget`, is of one bucket."""
    waiting: dict[Grid, list[Grid]] = {}
    for grid in grids:
        bucket = buckets.assign(grid, longest=budget)
        if bucket is None:
            continue
        batch = waiting.setdefault(bucket, [])
        batch.append(grid)
        if (len(batch) + 1) * math.prod(bucket) > budget:
            yield _bucketed(waiting.pop(bucket), bucket)
    for bucket, batch in waiting.items():
        yield _bucketed(batch, bucket)


def packed(grids: Sequence[Grid], budget: int, buckets: Buckets) -> Iterator[Batch]:
    """Samples as they are, packed into `budget` tokens, all of which are computed."""
    packer = StreamingPacker(PackRules(budget), look_ahead=_LOOK_AHEAD)
    packs = (pack for place, grid in enumerate(grids) for pack in packer.push(place, math.prod(grid)))
    for pack in _then(packs, packer.flush):
        # As the trainer has them: equal lengths side by side.
        content = sorted((grids[place] for place in pack), key=math.prod)
        yield Batch(tuple(content), budget, sum(map(math.prod, content)))


WAYS: dict[str, Way] = {"padding": padded, "bucketing": bucketed, "packing": packed}


def useful_tokens(grid: Grid, bucket: Grid) -> float:
    """Tokens of a sample that a bucket shows: enlarged by a factor f, f² tokens show what one did before.

    The sample is resized until it covers the bucket, and what sticks out is cut off; so are frames at the end.
    """
    (_, height, width), (frames, *sides) = grid, bucket
    enlarged = max(1.0, sides[0] / height, sides[1] / width)
    return frames * math.prod(sides) / enlarged**2


def _padded(batch: Sequence[Grid]) -> Batch:
    longest = max(batch, key=math.prod)
    return Batch((longest,) * len(batch), len(batch) * math.prod(longest), sum(map(math.prod, batch)))


def _bucketed(batch: Sequence[Grid], bucket: Grid) -> Batch:
    useful = round(sum(useful_tokens(grid, bucket) for grid in batch))
    return Batch((bucket,) * len(batch), len(batch) * math.prod(bucket), useful)


def _then(first: Iterable[list[int]], last: Callable[[], Iterable[list[int]]]) -> Iterator[list[int]]:
    yield from first
    yield from last()  # not before the first has run dry


def _sides(area: float, ratio: float) -> tuple[int, int]:
    """Height and width of about `area` tokens."""
    return max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))


def _log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(random.uniform(np.log(low), np.log(high))))
