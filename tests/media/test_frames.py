from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sora_fast.media.frames import Frame, at_rate, mean_rate
from tests.helpers import examples


def _frames(durations: list[Fraction], start: Fraction = Fraction(0)) -> list[Frame]:
    frames = []
    for duration in durations:
        frames.append(Frame(Image.new("RGB", (1, 1)), float(start), float(start + duration)))
        start += duration
    return frames


@examples(200)
@given(
    durations=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    start=st.integers(-500, 500),
    fps=st.sampled_from([Fraction(1, 2), 1, 2, 5, Fraction(25, 2), 25, 30, 60]),  # no instant just beside an edge
)
def test_each_instant_shows_the_frame_whose_interval_it_is_in(
    durations: list[int], start: int, fps: Fraction | int
) -> None:
    durations = [Fraction(duration, 50) for duration in durations]
    frames = _frames(durations, Fraction(start, 50))
    ends = [sum(durations[: index + 1]) for index in range(len(durations))]
    expected, tick = [], 0
    while tick == 0 or Fraction(tick) / fps < ends[-1]:
        expected.append(next(index for index, end in enumerate(ends) if Fraction(tick) / fps < end))
        tick += 1
    shown = list(at_rate(frames, float(fps)))
    assert [next(i for i, frame in enumerate(frames) if frame.image is one.image) for one in shown] == expected
    assert mean_rate(shown[0], shown[-1], len(shown)) == float(fps)


def test_a_still_image_is_shown_once() -> None:
    still = Frame(Image.new("RGB", (1, 1)))
    assert list(at_rate([still], 1000)) == [still]
    assert mean_rate(still, still, 1) is None
    assert list(at_rate([], 5)) == []


def test_the_mean_rate_is_what_the_file_states_if_that_is_true() -> None:
    stated = 30000 / 1001
    rounded = [Frame(Image.new("RGB", (1, 1)), i * 0.033, (i + 1) * 0.033, stated) for i in range(16)]
    assert mean_rate(rounded[0], rounded[-1], 16) == stated
    slow = [Frame(Image.new("RGB", (1, 1)), i / 10, (i + 1) / 10, stated) for i in range(16)]
    assert mean_rate(slow[0], slow[-1], 16) == pytest.approx(10)
