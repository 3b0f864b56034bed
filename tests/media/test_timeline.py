"""What a timeline says of a rate, beside what sampling the frames themselves gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sora_fast.media import Timeline
from sora_fast.media.frames import Frame, at_rate

DURATIONS = st.lists(st.sampled_from([0.02, 0.04, 1 / 24, 0.1, 0.333, 1.0]), min_size=1, max_size=12)


@given(DURATIONS, st.sampled_from([1.0, 4.0, 7.3, 24.0, 25.0, 60.0]), st.sampled_from([0.0, 1.5]))
def test_instants_of_a_rate(durations: list[float], fps: float, first: float) -> None:
    frames = []
    for number, seconds in enumerate(durations):
        start = first if number == 0 else frames[-1].end
        frames.append(Frame(Image.new("1", (number + 1, 1)), start, start + seconds))
    shown = [frame.image.width - 1 for frame in at_rate(frames, fps)]
    timeline = Timeline.of([frame.start for frame in frames], frames[-1].end, None, can_seek=True)
    assert timeline.ticks(fps) == len(shown)
    assert [timeline.shown(tick, fps) for tick in range(len(shown))] == shown


def test_even_frames_are_a_rule() -> None:
    even = Timeline.of([number / 30 + 2 for number in range(1000)], 1000 / 30 + 2, 30.0, can_seek=True)
    assert even.starts is None
    assert even.start(999) == pytest.approx(999 / 30 + 2)
    assert even.slack(5) == pytest.approx(1 / 120)
    assert even.mean_rate == 30
    assert Timeline.of([0.0, 0.1, 0.3], 0.4, 10.0, can_seek=True).starts == (0.0, 0.1, 0.3)
    assert Timeline(1).is_still
