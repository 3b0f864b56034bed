from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sora_fast.media.sheet import Strip, contact_sheet

BLUE = (31, 119, 180)


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def _count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(axis=-1).sum())


def test_a_sheet_shows_frames_from_first_to_last(tmp_path: Path) -> None:
    video = torch.full((3, 20, 10, 12), -1.0)
    video[0, 0], video[1, -1], video[2, 1:-1] = 1, 1, 1
    picture = _pixels(contact_sheet([Strip("a caption", video)], tmp_path / "new" / "sheet.png", columns=5, scale=3))
    area = 10 * 12 * 9
    assert [_count(picture, colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]] == [area, area, 3 * area]


def test_a_short_clip_shows_each_frame_once(tmp_path: Path) -> None:
    videos = [torch.full((1, frames, 8, 8), -1.0) for frames in (1, 3)]
    strips = [Strip(f"{video.shape[1]} × 8 × 8", video) for video in videos]
    assert _count(_pixels(contact_sheet(strips, tmp_path / "sheet.png", scale=2)), (0, 0, 0)) == 4 * 256


@pytest.mark.parametrize(("head", "tail", "framed"), [(0, 0, 0), (1, 0, 1), (0, 2, 2), (1, 1, 2), (4, 0, 4)])
def test_given_frames_are_framed_in_blue(tmp_path: Path, head: int, tail: int, framed: int) -> None:
    strip = Strip("", torch.full((1, 4, 16, 16), -1.0), head=head, tail=tail)
    picture = _pixels(contact_sheet([strip], tmp_path / "sheet.png", scale=2))
    border = 38 * 38 - 32 * 32
    found = _count(picture, BLUE)
    assert border * framed <= found < border * framed + 100 * (framed > 0) + 1  # and the blue of their numbers


def test_a_long_caption_is_not_cut(tmp_path: Path) -> None:
    narrow = Image.open(contact_sheet([Strip("", torch.zeros(1, 1, 8, 8))], tmp_path / "a.png")).width
    wide = Image.open(contact_sheet([Strip("many words " * 9, torch.zeros(1, 1, 8, 8))], tmp_path / "b.png")).width
    assert wide > narrow + 300


def test_errors_name_the_argument(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="strips"):
        contact_sheet([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="columns"):
        contact_sheet([Strip("", torch.zeros(1, 1, 8, 8))], tmp_path / "a.png", columns=1)
