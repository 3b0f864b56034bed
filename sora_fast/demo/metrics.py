"""What the detector says of generated clips, as plain numbers for `metrics.json`."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from .detector import Detection, DigitDetector, brightness, locate
from .digits import DIRECTIONS, NAMES, MovingDigits, Scene, Shape, read_caption, write_caption

CHANCE = {"digit": 1 / len(NAMES), "direction": 1 / len(DIRECTIONS)}


def prompts() -> list[str]:
    """The 40 captions of one moving digit."""
    return [write_caption([(digit, direction)]) for digit in range(len(NAMES)) for direction in DIRECTIONS]


def prompt_scores(detections: Sequence[Detection], captions: Sequence[str]) -> dict:
    """How often clips show the one digit, and the direction, that their captions asked for.

    Returns {"clips", "digit": {"right", "interval", "shuffled", "chance"}, "direction": the same or None for stills}.
    "interval" is Wilson's of 95%. "shuffled" is the mean over all pairings of a clip with another clip's caption: what
    "right" would be for a model that ignores its prompts.
    """
    if len(detections) != len(captions) or len(captions) < 2:
        raise ValueError(f"needs one detection a caption, at least two; got {len(detections)} and {len(captions)}")
    subjects = [read_caption(caption) for caption in captions]
    if any(len(subject) != 1 for subject in subjects):
        raise ValueError("captions must name one digit each: the detector follows the brightest one only")
    asked = {"digit": [digit for ((digit, _),) in subjects], "direction": [direction for ((_, direction),) in subjects]}
    scores: dict = {"clips": len(captions)}
    for name, wanted in asked.items():
        found = [getattr(detection, name) for detection in detections]
        scores[name] = None if None in wanted else _agreement(found, wanted) | {"chance": CHANCE[name]}
    return scores


def detector_ceiling(detector: DigitDetector, source: MovingDigits, shapes: Sequence[Shape]) -> dict:
    """`prompt_scores` of real clips, each of `prompts()` once a shape: what a perfect model would reach."""
    captions = prompts() * len(shapes)
    scenes = [
        source.scene(index, shape=shapes[index // len(prompts())], caption=caption)
        for index, caption in enumerate(captions)
    ]
    return prompt_scores([detector(source.render(scene)) for scene in scenes], captions)


def next_position(source: MovingDigits, scenes: Sequence[Scene], clips: Sequence[Tensor], *, given: int = 1) -> dict:
    """How far the digit of the first generated frame is from where it belongs, in pixels.

    `clips[i]` (1, T, H, W) continues the first `given` frames of `scenes[i]`, with its caption as the prompt. One given
    frame leaves the speed open, so the position counts that is nearest among those the source's speeds lead to; two
    frames settle it. "copy_last_frame" is the same for a clip that merely repeats the last given frame.

    Returns {"clips", "given_frames", "model", "copy_last_frame"}: means of the centroid's distance.
    """
    if len(scenes) != len(clips) or not clips:
        raise ValueError(f"needs one clip a scene, at least one; got {len(clips)} and {len(scenes)}")
    errors = {"model": [], "copy_last_frame": []}
    for scene, clip in zip(scenes, clips, strict=True):
        if tuple(clip.shape[1:]) != scene.shape or scene.shape[0] <= given:
            raise ValueError(
                f"clips must have the shapes of their scenes, with more than {given} frames; "
                f"got {tuple(clip.shape)} for {scene.shape}"
            )
        truths = [_centroids(source.render(real)) for real in source.continuations(scene, given)]
        places = {"model": _centroids(clip)[given], "copy_last_frame": truths[0][given - 1]}
        for name, place in places.items():
            errors[name].append(min(np.linalg.norm(place - truth[given]) for truth in truths))
    means = {name: float(np.mean(values)) for name, values in errors.items()}
    return {"clips": len(clips), "given_frames": given, **means}


def clean_frames_identical(
    clips: Sequence[Tensor], originals: Sequence[Tensor], *, head: int = 0, tail: int = 0
) -> bool:
    """Whether the first `head` and last `tail` frames of every (C, T, H, W) clip are the given ones, bit for bit."""
    if head < 0 or tail < 0 or head + tail == 0:
        raise ValueError(f"head and tail must not be negative, nor both zero; got {head} and {tail}")
    return all(
        _same_bits(clip[:, :head], original[:, :head])
        and _same_bits(clip[:, clip.shape[1] - tail :], original[:, original.shape[1] - tail :])
        for clip, original in zip(clips, originals, strict=True)
    )


def _agreement(found: list, wanted: list) -> dict:
    matches = np.array([[one == other for other in wanted] for one in found])
    right, count = int(np.trace(matches)), len(found)
    interval = binomtest(right, count).proportion_ci(method="wilson")
    return {
        "right": right / count,
        "interval": [float(interval.low), float(interval.high)],
        "shuffled": float(matches.sum() - right) / (count * (count - 1)),
    }


def _centroids(video: Tensor) -> np.ndarray:
    return locate(brightness(video))[0]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Stricter than equality, for which −0 is 0, and NaN never itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
