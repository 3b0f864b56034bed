from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from sora_fast.media import read_media, to_pixels, write_media
from tests.media.clips import noise, smooth_video

HALF_LEVEL = 0.51 / 127.5


@pytest.mark.parametrize("channels", [1, 3])
def test_mp4_comes_back_nearly_the_same(tmp_path: Path, channels: int) -> None:
    video = smooth_video(channels)
    path = write_media(tmp_path / "new" / "clip.mp4", video, fps=12)
    back = read_media(path, channels=channels)
    assert back.shape == video.shape and back.dtype == torch.float32
    # Colour has half the resolution of brightness.
    assert (back - video).abs().mean() < {1: 0.015, 3: 0.03}[channels]
    assert (back - video).abs().max() < {1: 0.12, 3: 0.25}[channels]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec.canonical_name == "h264" and stream.pix_fmt == "yuv420p" and stream.average_rate == 12


def test_mp4_colours_are_not_shifted(tmp_path: Path) -> None:
    for colour in [(1, -1, -1), (-1, 1, -1), (-1, -1, 1), (0.5, 0, -0.5), (1, 1, 1), (-1, -1, -1)]:
        video = torch.tensor(colour, dtype=torch.float32).view(3, 1, 1, 1).expand(3, 2, 16, 16)
        assert (read_media(write_media(tmp_path / "a.mp4", video)) - video).abs().max() < 3 / 127.5


def test_mp4_of_odd_sides_repeats_the_last_row_and_column(tmp_path: Path) -> None:
    video = smooth_video(1, 4, 33, 45)
    back = read_media(write_media(tmp_path / "a.mp4", video), channels=1)
    assert back.shape == (1, 4, 34, 46)
    assert (back[..., :33, :45] - video).abs().mean() < 0.015
    assert (back[..., 33, :45] - video[..., 32, :]).abs().mean() < 0.03


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".gif", ".png", ".GIF"])
def test_gif_and_png_lose_nothing_but_rounding(tmp_path: Path, suffix: str, channels: int, scale: int) -> None:
    video = noise(channels, 1 if suffix == ".png" else 6)
    if suffix != ".png" and channels == 3:
        video = (video > 0).float() * 2 - 1  # a GIF frame has 256 colours
    back = read_media(write_media(tmp_path / f"a{suffix}", video, scale=scale), channels=channels)
    enlarged = video.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    assert back.shape == enlarged.shape
    assert (back - enlarged).abs().max() < HALF_LEVEL


def test_gif_plays_at_its_rate_for_ever(tmp_path: Path) -> None:
    with Image.open(write_media(tmp_path / "a.gif", noise(), fps=10)) as image:
        assert image.info["duration"] == 100 and image.info["loop"] == 0 and image.n_frames == 6


def test_pixels_are_clamped_and_rounded() -> None:
    video = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0]).view(1, 1, 1, 5)
    assert to_pixels(video)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_pixels(torch.zeros(3, 2, 4, 5, dtype=torch.bfloat16)).shape == (2, 4, 5, 3)


def test_errors_name_the_argument(tmp_path: Path) -> None:
    video = noise()
    for path, match in [("a.mov", r"\.mp4, \.gif, \.png; got 'a.mov'"), ("a.png", "one frame, got 6")]:
        with pytest.raises(ValueError, match=match):
            write_media(tmp_path / path, video)
    for options in [{"fps": 0}, {"scale": 0}]:
        with pytest.raises(ValueError, match=next(iter(options))):
            write_media(tmp_path / "a.gif", video, **options)
    with pytest.raises(ValueError, match="1 NaN among"):
        write_media(tmp_path / "a.gif", torch.where(video == video.max(), torch.nan, video))
    for shape in [(6, 12, 16), (2, 6, 12, 16), (1, 0, 12, 16)]:
        with pytest.raises(ValueError, match="video must be"):
            write_media(tmp_path / "a.gif", torch.zeros(shape))
    assert list(tmp_path.iterdir()) == []
