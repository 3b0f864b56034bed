import json
from itertools import permutations

import numpy as np
import pytest
import torch

from sora_fast.demo.detector import Detection, DigitDetector
from sora_fast.demo.digits import DIRECTIONS, MovingDigits
from sora_fast.demo.metrics import clean_frames_identical, detector_ceiling, next_position, prompt_scores, prompts

SOURCE = MovingDigits(seed=2)
SHAPE = (8, 20, 20)


def _seen(digit: int | None, direction: str | None) -> Detection:
    return Detection(digit, direction, np.zeros((1, 2)))


def test_prompts_are_all_digits_in_all_directions() -> None:
    assert len(set(prompts())) == 40 and "an eight moving up" in prompts()


def test_scores_count_what_is_right() -> None:
    captions = ["a one moving left", "a two moving up", "a two moving down", "a three moving left"]
    seen = [_seen(1, "left"), _seen(2, "left"), _seen(None, "down"), _seen(2, None)]
    scores = prompt_scores(seen, captions)
    assert scores["clips"] == 4
    assert scores["digit"]["right"] == 2 / 4 and scores["direction"]["right"] == 2 / 4
    assert scores["digit"]["chance"] == 0.1 and scores["direction"]["chance"] == 0.25
    low, high = scores["digit"]["interval"]
    assert 0.1 < low < 0.5 < high < 0.9
    json.dumps(scores)


def test_shuffled_is_the_mean_over_all_derangements() -> None:
    digits, found = [1, 2, 2, 3], [1, 2, 1, 2]
    captions = [f"a {('one', 'two', 'three')[digit - 1]} moving up" for digit in digits]
    # Shuffles in which nobody keeps their own caption pair every clip with every other caption equally often.
    shuffles = [order for order in permutations(range(4)) if all(place != item for place, item in enumerate(order))]
    expected = np.mean([[found[place] == digits[item] for place, item in enumerate(order)] for order in shuffles])
    scores = prompt_scores([_seen(digit, "up") for digit in found], captions)
    assert scores["digit"]["shuffled"] == pytest.approx(expected)


def test_a_model_that_ignores_prompts_scores_its_shuffled_score() -> None:
    scores = prompt_scores([_seen(7, "left")] * 40, prompts())
    for name, chance in {"digit": 0.1, "direction": 0.25}.items():
        assert scores[name]["right"] == scores[name]["shuffled"] == chance


def test_stills_have_no_direction_to_score() -> None:
    scores = prompt_scores([_seen(1, None), _seen(2, None)], ["a one", "a three"])
    assert scores["direction"] is None and scores["digit"]["right"] == 0.5


def test_the_ceiling_is_high_and_its_shuffle_is_low(detector: DigitDetector) -> None:
    ceiling = detector_ceiling(detector, SOURCE, [SHAPE, (12, 28, 20)])
    assert ceiling["clips"] == 80
    assert ceiling["digit"]["right"] >= 0.97 and ceiling["direction"]["right"] >= 0.99
    assert ceiling["digit"]["shuffled"] < 0.11 and ceiling["direction"]["shuffled"] < 0.26


@pytest.mark.parametrize("given", [1, 2])
def test_next_position_of_the_truth_of_a_copy_and_of_a_mistake(given: int) -> None:
    scenes = [SOURCE.scene(index, shape=SHAPE, caption=caption) for index, caption in enumerate(prompts())]
    real = [SOURCE.render(scene) for scene in scenes]
    copies = [torch.cat([clip[:, :given], clip[:, given - 1 : given].expand(1, 8 - given, 20, 20)], 1) for clip in real]
    truth, copy = (
        next_position(SOURCE, scenes, real, given=given),
        next_position(SOURCE, scenes, copies, given=given),
    )
    assert truth["model"] == 0 and truth["clips"] == 40 and truth["given_frames"] == given
    assert copy["model"] == copy["copy_last_frame"] == truth["copy_last_frame"]
    # One frame leaves the slow speed possible, except where the digit lies too near to the edge for the fast one.
    speeds = [1 if given == 1 else scene.movers[0].speed for scene in scenes]
    assert truth["copy_last_frame"] == pytest.approx(np.mean(speeds), abs=0.2)
    blank = [torch.full((1, *SHAPE), -1.0)] * 40
    assert next_position(SOURCE, scenes, blank, given=given)["model"] > truth["copy_last_frame"]


def test_next_position_accepts_every_speed_that_one_frame_leaves_open() -> None:
    scene = SOURCE.scene(0, shape=(8, 32, 32), caption="a seven moving right")
    others = SOURCE.continuations(scene, 1)
    for other in others:
        assert next_position(SOURCE, [scene], [SOURCE.render(other)])["model"] == 0
    wrong = SOURCE.render(scene).flip(1)
    wrong[:, :1] = SOURCE.render(scene)[:, :1]
    assert next_position(SOURCE, [scene], [wrong])["model"] > 1


def test_clean_frames_are_compared_bit_for_bit() -> None:
    original = torch.rand(1, 6, 4, 4) * 2 - 1
    clip = original.clone()
    clip[:, 2:4] = 9
    assert clean_frames_identical([clip], [original], head=2, tail=2)
    assert not clean_frames_identical([clip], [original], head=3)
    assert not clean_frames_identical([clip], [original], tail=3)
    assert not clean_frames_identical([original, clip], [original, original], head=1, tail=3)
    clip[0, 0, 0, 0] = torch.nextafter(clip[0, 0, 0, 0], torch.tensor(2.0))
    assert not clean_frames_identical([clip], [original], head=1)
    signed = torch.zeros(1, 1, 4, 4)
    assert not clean_frames_identical([-signed], [signed], head=1)
    assert not clean_frames_identical([signed.double()], [signed], head=1)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="caption"):
        prompt_scores([_seen(1, "up")], prompts())
    with pytest.raises(ValueError, match="one digit each"):
        prompt_scores([_seen(1, "up")] * 2, ["a one and a two"] * 2)
    scene = SOURCE.scene(0, shape=SHAPE, caption="a one moving up")
    with pytest.raises(ValueError, match=r"\(1, 8, 20, 24\)"):
        next_position(SOURCE, [scene], [torch.zeros(1, 8, 20, 24)])
    with pytest.raises(ValueError, match="one clip a scene"):
        next_position(SOURCE, [scene], [])
    for head, tail in [(0, 0), (-1, 2)]:
        with pytest.raises(ValueError, match="head and tail"):
            clean_frames_identical([], [], head=head, tail=tail)
    assert set(DIRECTIONS) == {caption.split()[-1] for caption in prompts()}
