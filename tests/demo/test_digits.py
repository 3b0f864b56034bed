import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from sora_fast.demo.digits import (
    DIRECTIONS,
    DigitsConfig,
    Mover,
    MovingDigits,
    Scene,
    load_scans,
    read_caption,
    write_caption,
)

SOURCE = MovingDigits()
indices = st.integers(0, 10**9)


def _walk(mover: Mover, shape: tuple[int, int, int]) -> list[tuple[int, int]]:
    """The path as a ball would run it: step by step, turning round where the next step would leave the frame."""
    (y, x), (dy, dx) = mover.start, DIRECTIONS.get(mover.direction, (0, 0))
    position, velocity = [y, x], [dy * mover.speed, dx * mover.speed]
    path = []
    for _ in range(shape[0]):
        path.append(tuple(position))
        for axis in range(2):
            reach = shape[1 + axis] - 8
            position[axis] += velocity[axis]
            if position[axis] > reach:
                position[axis], velocity[axis] = 2 * reach - position[axis], -velocity[axis]
            elif position[axis] < 0:
                position[axis], velocity[axis] = -position[axis], -velocity[axis]
    return path


@given(indices)
def test_a_sample_is_its_scans_moved_over_black(index: int) -> None:
    scene = SOURCE.scene(index)
    video = SOURCE[index].video
    expected = torch.full((1, *scene.shape), -1.0)
    for mover in scene.movers:
        scan = torch.from_numpy(SOURCE.images[mover.scan]) * 2 - 1
        for frame, (y, x) in zip(expected[0], _walk(mover, scene.shape), strict=True):
            area = frame[y : y + 8, x : x + 8]
            area.copy_(torch.maximum(area, scan))
    assert video.dtype == torch.float32
    assert torch.equal(video, expected)


@given(indices)
def test_the_caption_names_what_the_first_steps_show(index: int) -> None:
    scene = SOURCE.scene(index)
    labels = load_scans("model")[1]
    subjects = read_caption(SOURCE[index].caption)
    assert len(subjects) == len(scene.movers) <= 2
    for (digit, direction), mover in zip(subjects, scene.movers, strict=True):
        assert labels[mover.scan] == digit
        assert (direction is None) == (scene.shape[0] == 1)
        steps = np.diff(mover.path(scene.shape), axis=0)[:3]
        assert (steps == np.array(DIRECTIONS.get(direction, (0, 0))) * mover.speed).all()


def test_every_direction_and_speed_fits_the_smallest_frame() -> None:
    for index in range(200):
        for direction, step in DIRECTIONS.items():
            mover = SOURCE.scene(index, shape=(4, 16, 16), caption=f"a one moving {direction}").movers[0]
            assert (np.diff(mover.path((4, 16, 16)), axis=0) == np.array(step) * mover.speed).all()


def test_a_stream_is_determined_by_seed_and_index_alone() -> None:
    backwards = [MovingDigits(seed=3)[index] for index in reversed(range(20))]
    for one, other in zip([MovingDigits(seed=3)[index] for index in range(20)], reversed(backwards), strict=True):
        assert one.caption == other.caption and torch.equal(one.video, other.video)
    assert [SOURCE[index].caption for index in range(20)] != [sample.caption for sample in reversed(backwards)]


def test_the_shape_is_known_without_drawing() -> None:
    source = MovingDigits(seed=3)
    assert all(source.shape(index) == tuple(source[index].video.shape) for index in range(50))


def test_the_draw_follows_the_configuration() -> None:
    config = SOURCE.config
    scenes = [SOURCE.scene(index) for index in range(4000)]
    clips = [scene.shape for scene in scenes if scene.shape[0] > 1]
    assert len(clips) / len(scenes) == pytest.approx(1 - config.image_share, abs=0.025)
    assert np.mean([len(scene.movers) == 2 for scene in scenes]) == pytest.approx(config.pair_share, abs=0.025)
    assert {shape[0] for shape in clips} == set(config.durations)
    assert {side for shape in clips for side in shape[1:]} == set(config.sides)
    assert max(max(h, w) / min(h, w) for _, h, w in clips) == config.max_aspect
    assert not set(clips) & set(config.unseen)
    assert len({(mover.digit, mover.direction) for scene in scenes for mover in scene.movers}) == 50
    assert {mover.speed for scene in scenes for mover in scene.movers if mover.direction} == set(config.speeds)
    tokens = [t * math.ceil(h / 8) * math.ceil(w / 8) for t, h, w in (scene.shape for scene in scenes)]
    assert np.mean(tokens) == pytest.approx(45, abs=3), "what the configuration's docstring says"


def test_two_digits_start_apart_where_there_is_room() -> None:
    for index in range(100):
        first, second = SOURCE.scene(index, shape=(8, 48, 48), caption="a one moving up and a two moving left").movers
        assert max(abs(a - b) for a, b in zip(first.start, second.start, strict=True)) >= 8


def test_the_halves_share_no_scan_and_lose_none() -> None:
    (images, labels), (others, other_labels) = load_scans("model"), load_scans("detector")
    scans = load_digits()
    both = np.concatenate([images, others]).reshape(-1, 64)
    assert sorted(map(bytes, both)) == sorted(map(bytes, (scans.images / 16).astype(np.float32).reshape(-1, 64)))
    assert abs(np.bincount(labels) - np.bincount(other_labels)).max() <= 1
    assert images.min() == 0 and images.max() == 1
    with pytest.raises(ValueError, match="half"):
        load_scans("test")


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([None, *DIRECTIONS])), min_size=1, max_size=2))
def test_captions_read_back(subjects: list[tuple[int, str | None]]) -> None:
    assert read_caption(write_caption(subjects)) == subjects


def test_captions_in_english() -> None:
    assert write_caption([(7, "left")]) == "a seven moving left"
    assert write_caption([(3, "up"), (8, "right")]) == "a three moving up and an eight moving right"
    for caption in ("", "a cat moving left", "a seven moving", "seven moving left", "a seven moving left "):
        with pytest.raises(ValueError, match="caption"):
            read_caption(caption)


@given(indices, st.sampled_from(SOURCE.config.seen))
def test_continuations_are_the_speeds_that_the_given_frames_leave_open(index: int, shape: tuple[int, int, int]) -> None:
    scene = SOURCE.scene(index, shape=shape, caption="a five moving down")
    open_ended, settled = SOURCE.continuations(scene, 1), SOURCE.continuations(scene, 2)
    assert settled == [scene]
    assert scene in open_ended and len(open_ended) <= 2
    assert {other.movers[0].speed for other in open_ended} <= {1, 2}
    for other in open_ended:
        assert torch.equal(SOURCE.render(other)[:, :1], SOURCE.render(scene)[:, :1])
        assert (np.diff(other.movers[0].path(shape), axis=0)[:3] == (other.movers[0].speed, 0)).all()


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="sides must be at least 14"):
        DigitsConfig(sides=(12, 16))
    with pytest.raises(ValueError, match=r"unseen shapes must not be drawn in training; \[\(8, 20, 24\)\]"):
        DigitsConfig(unseen=((8, 20, 24),))
    with pytest.raises(ValueError, match="seen shapes must be among"):
        DigitsConfig(seen=((8, 20, 60),))
    with pytest.raises(ValueError, match="pair_share"):
        DigitsConfig(pair_share=1.5)
    with pytest.raises(ValueError, match="durations"):
        DigitsConfig(durations=())
    with pytest.raises(ValueError, match="seed"):
        MovingDigits(seed=-1)
    with pytest.raises(IndexError, match="index"):
        SOURCE[-1]
    with pytest.raises(ValueError, match="shape"):
        SOURCE.scene(0, shape=(8, 12, 20))
    pair = SOURCE.scene(0, shape=(8, 32, 32), caption="a one moving up and a two moving up")
    with pytest.raises(ValueError, match="one digit"):
        SOURCE.continuations(pair, 1)
    with pytest.raises(ValueError, match="given"):
        SOURCE.continuations(Scene(pair.shape, pair.movers[:1]), 9)
