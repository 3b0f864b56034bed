"""Real handwritten digits that move over a frame: an endless, deterministic source of captioned clips and stills.

The scans are the 1,797 that scikit-learn carries (8 × 8 pixels, 17 grey levels), shown at their native resolution.
They are split in two disjoint halves: "model" is what this source draws from, "detector" is what judges its results.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product

import numpy as np
import torch
from sklearn.datasets import load_digits

from sora_fast.training.data.sources import Sample

Shape = tuple[int, int, int]  # (T, H, W) in frames and pixels
Subject = tuple[int, str | None]  # what a caption says of one digit: which, and where it moves (None: a still)

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (dy, dx) of a step
SCAN = 8  # pixels a side
FREE_STEPS = 3  # no bounce before that many steps, so that the first frames show the direction that the caption names
APART_TRIES = 8  # draws of a second digit until the two start apart; a 16-pixel frame may well have no such place


@dataclass(frozen=True)
class DigitsConfig:
    """Which clips the source draws. The shapes in `unseen` are held out: never drawn, only ever asked for.

    A shape (T, H, W) is drawn with probability ∝ (H·W)^−size_bias · T^−duration_bias: 0 is uniform, with 1 each size
    contributes as many pixels as any other. With 4 and 1.5 the mean clip is 7.6 frames long and 1 in 26 is larger than
    28 × 28 pixels, so that a CPU sees many clips. (The largest have 576 tokens of 1 × 8 × 8, the mean one has 45.)
    speeds: in pixels a frame.
    """

    durations: tuple[int, ...] = tuple(range(4, 17))
    sides: tuple[int, ...] = tuple(range(16, 49, 4))
    max_aspect: float = 2.0
    size_bias: float = 4.0
    duration_bias: float = 1.5
    image_share: float = 0.15
    pair_share: float = 0.05
    speeds: tuple[int, ...] = (1, 2)
    seen: tuple[Shape, ...] = ((8, 20, 20), (16, 16, 24), (12, 28, 20), (6, 32, 32))
    unseen: tuple[Shape, ...] = ((8, 16, 40), (8, 40, 16), (20, 20, 20), (24, 20, 24))

    def __post_init__(self) -> None:
        for name in ("durations", "sides", "speeds"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be positive and not empty, got {getattr(self, name)}")
        if min(self.sides) < self.smallest_side:
            raise ValueError(f"sides must be at least {self.smallest_side} pixels, got {self.sides}")
        for name in ("image_share", "pair_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        drawn = set(self.shapes)
        if missing := [shape for shape in self.seen if shape not in drawn]:
            raise ValueError(f"seen shapes must be among those drawn; {missing} are not")
        if leaked := [shape for shape in self.unseen if shape in drawn]:
            raise ValueError(f"unseen shapes must not be drawn in training; {leaked} are")

    @property
    def smallest_side(self) -> int:
        """In pixels: what a digit and its free steps need."""
        return SCAN + FREE_STEPS * max(self.speeds)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Every shape of a clip that training may see."""
        return tuple(
            (t, h, w)
            for t, h, w in product(self.durations, self.sides, self.sides)
            if max(h, w) <= self.max_aspect * min(h, w)
        )

    @cached_property
    def shape_odds(self) -> np.ndarray:
        """Cumulative probabilities of `shapes`."""
        frames, height, width = np.array(self.shapes, dtype=np.float64).T
        weights = (height * width) ** -self.size_bias * frames**-self.duration_bias
        return np.cumsum(weights / weights.sum())


@dataclass(frozen=True)
class Mover:
    """One digit on its way: its `scan` (a row of the half), `speed` in pixels a frame, first top left corner (y, x)."""

    digit: int
    scan: int
    direction: str | None
    speed: int
    start: tuple[int, int]

    def path(self, shape: Shape) -> np.ndarray:
        """(T, 2) int: top left corners (y, x), bounced off the frame's edges."""
        frames, *sides = shape
        reach = np.array(sides) - SCAN
        step = np.array(DIRECTIONS.get(self.direction, (0, 0))) * self.speed
        return reach - np.abs((np.array(self.start) + np.arange(frames)[:, None] * step) % (2 * reach) - reach)

    def runs_free(self, shape: Shape) -> bool:
        """Whether the first FREE_STEPS steps stay clear of the edges."""
        step = np.array(DIRECTIONS.get(self.direction, (0, 0))) * self.speed
        end = np.array(self.start) + FREE_STEPS * step
        return bool((end >= 0).all() and (end <= np.array(shape[1:]) - SCAN).all())


@dataclass(frozen=True)
class Scene:
    """All that is to know about a clip: what moves, and over which frame."""

    shape: Shape
    movers: tuple[Mover, ...]

    @property
    def caption(self) -> str:
        return write_caption([(mover.digit, mover.direction) for mover in self.movers])


@lru_cache(maxsize=2)
def load_scans(half: str) -> tuple[np.ndarray, np.ndarray]:
    """(images [n, 8, 8] float32 in [0, 1], labels [n]) of one half, "model" or "detector".

    Each half has every other scan of each digit, so that both hold the same digits by the same hands.
    """
    halves = ("model", "detector")
    if half not in halves:
        raise ValueError(f"half must be one of {halves}, got {half!r}")
    scans = load_digits()
    rows = np.concatenate([np.flatnonzero(scans.target == digit)[halves.index(half) :: 2] for digit in range(10)])
    return (scans.images[rows] / 16).astype(np.float32), scans.target[rows]


def write_caption(subjects: list[Subject]) -> str:
    """[(7, "left")] → "a seven moving left"; [(3, "up"), (8, None)] → "a three moving up and an eight"."""
    return " and ".join(
        ("an " if digit == 8 else "a ") + NAMES[digit] + (f" moving {direction}" if direction else "")
        for digit, direction in subjects
    )


def read_caption(caption: str) -> list[Subject]:
    """The inverse of `write_caption`; ValueError for a caption that it could not have written."""
    subjects = []
    for phrase in caption.split(" and "):
        match = re.fullmatch(rf"an? ({'|'.join(NAMES)})(?: moving ({'|'.join(DIRECTIONS)}))?", phrase)
        if match is None:
            raise ValueError(f'caption must read like "a seven moving left" or "a three and an eight", got {caption!r}')
        subjects.append((NAMES.index(match[1]), match[2]))
    return subjects


class MovingDigits:
    """The source: `source[index]` is a `Sample`, video (1, T, H, W) float32, the same at every call, for any index ≥ 0.

    A stream is determined by `seed`: sources of different seeds draw different clips from the same scans. half: of the
    scans, "model", or those that no model is trained on, "detector".
    """

    def __init__(self, config: DigitsConfig | None = None, *, seed: int = 0, half: str = "model") -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.config = config or DigitsConfig()
        self.seed = seed
        self.images, labels = load_scans(half)
        self.rows = [np.flatnonzero(labels == digit) for digit in range(10)]

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        return Sample(video=self.render(scene), caption=scene.caption)

    def shape(self, index: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of `self[index].video`, without drawing it."""
        return 1, *self._draw_shape(np.random.default_rng((self.seed, index)))

    def scene(self, index: int, *, shape: Shape | None = None, caption: str | None = None) -> Scene:
        """The scene behind `source[index]`, or one of the given shape or caption with everything else drawn."""
        if index < 0:
            raise IndexError(f"index must not be negative, got {index}")
        if shape is not None and (shape[0] < 1 or min(shape[1:]) < self.config.smallest_side):
            raise ValueError(f"shape must be (T, H, W) with H, W at least {self.config.smallest_side}, got {shape}")
        random = np.random.default_rng((self.seed, index))
        shape = self._draw_shape(random) if shape is None else shape
        subjects = self._draw_subjects(random, shape) if caption is None else read_caption(caption)
        movers: list[Mover] = []
        for subject in subjects:
            movers.append(self._draw_mover(random, shape, subject, movers))
        return Scene(shape, tuple(movers))

    def render(self, scene: Scene) -> torch.Tensor:
        """(1, T, H, W) float32 in [-1, 1]: the brighter wins where digits meet, the ground is black."""
        canvas = np.zeros(scene.shape, dtype=np.float32)
        times = np.arange(scene.shape[0])[:, None, None]
        square = np.arange(SCAN)
        for mover in scene.movers:
            corners = mover.path(scene.shape)[:, :, None]
            area = times, (corners[:, 0] + square)[:, :, None], (corners[:, 1] + square)[:, None, :]
            canvas[area] = np.maximum(canvas[area], self.images[mover.scan])
        return torch.from_numpy(canvas * 2 - 1)[None]

    def continuations(self, scene: Scene, given: int) -> list[Scene]:
        """Every scene the source could have drawn that starts with the first `given` frames of this one-digit scene.

        They differ in speed alone: one frame leaves it open, two settle it.
        """
        if len(scene.movers) != 1:
            raise ValueError(f"scene must have one digit, got {len(scene.movers)}")
        if not 1 <= given <= scene.shape[0]:
            raise ValueError(f"given must be 1 to {scene.shape[0]} frames of this scene, got {given}")
        mover = scene.movers[0]
        candidates = [replace(mover, speed=speed) for speed in self.config.speeds]
        known = mover.path(scene.shape)[:given]
        return [
            replace(scene, movers=(candidate,))
            for candidate in candidates
            if candidate.runs_free(scene.shape) and (candidate.path(scene.shape)[:given] == known).all()
        ]

    def _draw_shape(self, random: np.random.Generator) -> Shape:
        place, still = random.random(2)
        shape = self.config.shapes[min(np.searchsorted(self.config.shape_odds, place), len(self.config.shapes) - 1)]
        return (1, *shape[1:]) if still < self.config.image_share else shape

    def _draw_subjects(self, random: np.random.Generator, shape: Shape) -> list[Subject]:
        count = 1 + int(random.random() < self.config.pair_share)
        directions = list(DIRECTIONS)
        return [
            (int(digit), directions[way] if shape[0] > 1 else None)
            for digit, way in random.integers((10, len(directions)), size=(count, 2))
        ]

    def _draw_mover(self, random: np.random.Generator, shape: Shape, subject: Subject, others: list[Mover]) -> Mover:
        digit, direction = subject
        scan = int(self.rows[digit][random.integers(len(self.rows[digit]))])
        speed = int(self.config.speeds[random.integers(len(self.config.speeds))]) if direction else 0
        room = np.array(DIRECTIONS.get(direction, (0, 0))) * speed * FREE_STEPS
        low, high = np.maximum(-room, 0), np.array(shape[1:]) - SCAN - np.maximum(room, 0)
        for _ in range(APART_TRIES):
            start = random.integers(low, high, endpoint=True)
            if all(np.abs(start - other.start).max() >= SCAN for other in others):
                break
        return Mover(digit, scan, direction, speed, (int(start[0]), int(start[1])))
