from pathlib import Path

import pytest

from sora_fast.media import Timeline
from sora_fast.training.data.scenes import CutsError, match_cuts, read_cuts, scenes

EVEN = Timeline(20, step=0.125, end=2.5)
UNEVEN = Timeline.of([0.0, 0.5, 0.6, 0.7, 2.0, 2.4], 3.0, 2.0, can_seek=True)
TABLE = """Timecode List:,00:00:02.000,00:00:03.500
Scene Number,Start Frame,Start Timecode,Start Time (seconds),End Frame,Length (seconds)
1,1,00:00:00.000,0.000,16,2.000
2,17,00:00:02.000,2.000,28,1.500
3,29,00:00:03.500,3.500,30,0.125
"""


@pytest.mark.parametrize(
    ("timeline", "cuts", "fps", "expected"),
    [
        (EVEN, [], None, [(0, 20)]),
        (EVEN, [0.0, 1.0, 1.375], None, [(0, 8), (8, 11), (11, 20)]),
        (EVEN, [1.0, 99.0], None, [(0, 8), (8, 20)]),
        (EVEN, [1.0], 4, [(0, 4), (4, 10)]),
        (EVEN, [1.125], 4, [(0, 5), (5, 10)]),  # what is shown at 1.0 s is still the scene before
        (UNEVEN, [0.6, 2.0], None, [(0, 2), (2, 4), (4, 6)]),
        (UNEVEN, [0.6, 2.0], 10, [(0, 6), (6, 20), (20, 30)]),
    ],
)
def test_scenes(timeline: Timeline, cuts: list[float], fps: float | None, expected: list[tuple[int, int]]) -> None:
    assert scenes(timeline, cuts, fps) == expected


def test_lists(tmp_path: Path) -> None:
    for name, text in {"a.cuts": "2.5\n\n1\n", "b-Scenes.csv": TABLE, "c-Scenes.csv": TABLE.split("\n", 1)[1]}.items():
        (tmp_path / name).write_text(text)
    assert read_cuts(tmp_path / "a.cuts") == [1.0, 2.5]
    assert read_cuts(tmp_path / "b-Scenes.csv") == read_cuts(tmp_path / "c-Scenes.csv") == [0.0, 2.0, 3.5]


@pytest.mark.parametrize(("name", "text"), [("a.cuts", "soon"), ("a.cuts", "-1"), ("a-Scenes.csv", "frame\n3\n")])
def test_lists_that_cannot_be_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CutsError, match="its list of scene cuts"):
        read_cuts(tmp_path / name)


def test_which_list_is_whose() -> None:
    media = [Path("a.mp4"), Path("b.mkv"), Path("deep/a.mp4")]
    lists = [Path("a.cuts"), Path("a.mp4.cuts"), Path("b-Scenes.csv"), Path("c.cuts")]
    assert match_cuts(media, lists) == {Path("a.mp4"): Path("a.mp4.cuts"), Path("b.mkv"): Path("b-Scenes.csv")}
