"""An independent eye: which digit a clip shows and where it moves, learned from real scans alone.

It is fitted on the half of the scans that no model was trained on, and tuned to none: the digit is found as the
brightest 8 × 8 window of a frame, read by a support vector machine, and followed by its centroid.
"""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.svm import SVC

from .digits import DIRECTIONS, FREE_STEPS, SCAN, load_scans

DIM = 0.25  # of full brightness; what is darker counts as ground, so that faint noise cannot pull the centroid
PRESENT = 0.5  # of the light of the faintest real scan; a frame with less shows no digit
MOVING = 0.5  # pixels a frame; half of the slowest speed, below which a digit counts as standing still


@dataclass(frozen=True, eq=False)
class Detection:
    """What one clip shows.

    digit: the class with the highest score over all frames; None if most frames show nothing.
    direction: "left", "right", "up", "down"; None if the digit stands still, or the clip is an image.
    centroids: (T, 2) float, (y, x) of the light in pixels; the middle of the frame where all is dark.
    """

    digit: int | None
    direction: str | None
    centroids: np.ndarray


class DigitDetector:
    """`detector(video)` for a (C, T, H, W) tensor in [-1, 1] with one digit in it; NaN counts as black."""

    def __init__(self) -> None:
        images, labels = load_scans("detector")
        frames = np.pad(images, ((0, 0), (SCAN, SCAN), (SCAN, SCAN)))
        centroids, light = locate(frames)
        self.least_light = PRESENT * light.min()
        # One pixel off in each direction as well: in a blurred frame the centroid rounds to the neighbouring pixel.
        offsets = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        crops = np.concatenate([_crop(frames, centroids + offset) for offset in offsets])
        self.classifier = SVC(C=10).fit(crops, np.tile(labels, len(offsets)))  # RBF kernel, width from the data

    def __call__(self, video: torch.Tensor) -> Detection:
        frames = brightness(video)
        centroids, light = locate(frames)
        shown = light >= self.least_light
        digit = None
        if 2 * shown.sum() > len(frames):
            scores = self.classifier.decision_function(_crop(frames[shown], centroids[shown]))
            digit = int(self.classifier.classes_[scores.sum(axis=0).argmax()])
        return Detection(digit, direction_of(centroids), centroids)


def brightness(video: torch.Tensor) -> np.ndarray:
    """(C, T, H, W) in [-1, 1] → (T, H, W) float32 in [0, 1]."""
    if video.ndim != 4 or min(video.shape[2:]) < SCAN or 0 in video.shape:
        raise ValueError(f"video must be (C, T, H, W) with H and W at least {SCAN}, got {tuple(video.shape)}")
    light = video.detach().to("cpu", torch.float32).mean(0).add(1).div(2)
    return light.nan_to_num(0).clamp(0, 1).numpy()


def locate(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroids (T, 2) and amounts (T,) of the light in the brightest SCAN × SCAN window of each (T, H, W) frame."""
    light = np.where(frames > DIM, frames, 0)
    windows = np.lib.stride_tricks.sliding_window_view(light, (SCAN, SCAN), axis=(1, 2))
    sums = windows.sum(axis=(3, 4))
    tops, lefts = np.unravel_index(sums.reshape(len(frames), -1).argmax(axis=1), sums.shape[1:])
    best = windows[np.arange(len(frames)), tops, lefts]
    amounts = best.sum(axis=(1, 2))
    pixels = np.arange(SCAN)
    weight = np.maximum(amounts, np.finfo(np.float32).tiny)
    ys = tops + (best.sum(axis=2) @ pixels) / weight
    xs = lefts + (best.sum(axis=1) @ pixels) / weight
    middle = (np.array(frames.shape[1:]) - 1) / 2
    return np.where(amounts[:, None] > 0, np.stack([ys, xs], axis=1), middle), amounts


def direction_of(centroids: np.ndarray) -> str | None:
    """The direction of the first FREE_STEPS steps, before any bounce: the slope of a line fitted to the centroids."""
    start = centroids[: FREE_STEPS + 1]
    if len(start) < 2:
        return None
    times = np.arange(len(start)) - (len(start) - 1) / 2
    dy, dx = times @ start / (times @ times)
    if max(abs(dy), abs(dx)) < MOVING:
        return None
    step = (int(np.sign(dy)), 0) if abs(dy) > abs(dx) else (0, int(np.sign(dx)))
    return next(name for name, unit in DIRECTIONS.items() if unit == step)


def _crop(frames: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(T, SCAN²): the window of each frame whose middle is nearest to its centroid, black beyond the edges."""
    padded = np.pad(frames, ((0, 0), (SCAN, SCAN), (SCAN, SCAN)))
    corners = np.rint(centroids - (SCAN - 1) / 2).astype(int)[:, :, None] + SCAN
    square = np.arange(SCAN)
    rows, columns = (corners[:, 0] + square)[:, :, None], (corners[:, 1] + square)[:, None, :]
    return padded[np.arange(len(frames))[:, None, None], rows, columns].reshape(len(frames), -1)
