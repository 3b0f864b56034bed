import io
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import torch
from PIL import Image

from sora_fast.media import UnreadableMedia, images, read_clip, read_media
from tests.media.files import UPRIGHT, four_corners


def _box(kind: bytes, *content: bytes) -> bytes:
    data = b"".join(content)
    return struct.pack(">I", 8 + len(data)) + kind + data


def _full_box(kind: bytes, version: int, flags: int, *content: bytes) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags), *content)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    while data:
        size, kind = struct.unpack(">I4s", data[:8])
        yield kind, data[8:size]
        data = data[size:]


def _find(data: bytes, *path: bytes) -> bytes:
    for kind in path:
        data = next(content for name, content in _boxes(data) if name == kind)
        data = data[4:] if kind == b"meta" else data
    return data


def _grid(
    tiles: list[bytes], kind: bytes, brand: bytes, columns: int, size: tuple[int, int], tile: tuple[int, int]
) -> bytes:
    """An image that is a grid of tiles, each a file of one image; as phones write it."""
    config = b"av1C" if kind == b"av01" else b"hvcC"
    coded = [_find(data, b"mdat") for data in tiles]
    layout = struct.pack(">BBBBHH", 0, 0, len(tiles) // columns - 1, columns - 1, *size)
    contents = [layout, *coded]
    count = len(contents)

    def meta(offset: int) -> bytes:
        infos = [
            _full_box(b"infe", 2, int(n > 1), struct.pack(">HH", n, 0), b"grid" if n == 1 else kind, b"\0")
            for n in range(1, count + 1)
        ]
        places = b""
        for number, content in enumerate(contents, 1):
            places += struct.pack(">HHHII", number, 0, 1, offset, len(content))
            offset += len(content)
        whole, part = (_full_box(b"ispe", 0, 0, struct.pack(">II", *shape)) for shape in (size, tile))
        depth = _full_box(b"pixi", 0, 0, bytes([3, 8, 8, 8]))
        properties = _box(b"ipco", whole, part, depth, _box(config, _find(tiles[0], b"meta", b"iprp", b"ipco", config)))
        uses = [struct.pack(">HB", 1, 2) + bytes([1, 3])]
        uses += [struct.pack(">HB", number, 3) + bytes([2, 3, 0x84]) for number in range(2, count + 1)]
        return _full_box(
            b"meta", 0, 0,
            _full_box(b"hdlr", 0, 0, bytes(4), b"pict", bytes(13)),
            _full_box(b"pitm", 0, 0, struct.pack(">H", 1)),
            _full_box(b"iloc", 0, 0, bytes([0x44, 0]), struct.pack(">H", count), places),
            _full_box(b"iinf", 0, 0, struct.pack(">H", count), *infos),
            _full_box(b"iref", 0, 0, _box(b"dimg", struct.pack(f">{count + 1}H", 1, count - 1, *range(2, count + 1)))),
            _box(b"iprp", properties, _full_box(b"ipma", 0, 0, struct.pack(">I", count), *uses)),
        )  # fmt: skip

    head = _box(b"ftyp", brand, bytes(4), b"mif1", brand, b"miaf")
    return head + meta(len(head) + len(meta(0)) + 8) + _box(b"mdat", *contents)


def _encoded(pixels: np.ndarray, kind: bytes) -> bytes:
    file = io.BytesIO()
    if kind == b"av01":
        Image.fromarray(pixels).save(file, "avif", quality=95)
    else:
        pillow_heif.from_pillow(Image.fromarray(pixels)).save(file, quality=95)
    return file.getvalue()


def _as_video(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture / 127.5 - 1).permute(2, 0, 1)[:, None]


@pytest.mark.parametrize(("kind", "brand"), [(b"av01", b"avif"), (b"hvc1", b"heic")])
def test_a_grid_of_tiles_is_read_whole(tmp_path: Path, kind: bytes, brand: bytes) -> None:
    picture = four_corners(256, 384)
    tiles = [_encoded(picture[top : top + 128, left : left + 128], kind) for top in (0, 128) for left in (0, 128, 256)]
    path = tmp_path / "a.img"
    path.write_bytes(_grid(tiles, kind, brand, columns=3, size=(380, 250), tile=(128, 128)))  # the last ones are cut
    back = read_media(path)
    assert back.shape == (3, 1, 250, 380)
    assert (back - _as_video(picture[:250, :380])).abs().mean() < 0.03
    whole = path.read_bytes()
    for share in (0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UnreadableMedia, match="truncated"):
            read_media(path)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_eight_orientations_of_heic(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    heif = pillow_heif.from_pillow(Image.fromarray(four_corners(64, 96)))
    heif.save(tmp_path / "a.heic", quality=95, exif=exif.tobytes())
    expected = _as_video(UPRIGHT[orientation](four_corners(64, 96)))
    back = read_media(tmp_path / "a.heic")
    assert back.shape == expected.shape
    assert (back - expected).abs().mean() < 0.03


def test_of_several_images_in_a_heic_the_primary_one_is_read(tmp_path: Path) -> None:
    heif = pillow_heif.HeifFile()
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        heif.add_from_pillow(Image.new("RGB", (64, 64), colour))
    heif.save(tmp_path / "a.heic", primary_index=1, quality=95)
    back = read_media(tmp_path / "a.heic")
    assert back.shape == (3, 1, 64, 64)
    assert back[1].min() > 0.9 and back[0].max() < -0.9 and back[2].max() < -0.9


def test_transparency_and_depth_of_heic(tmp_path: Path) -> None:
    pixels = np.full((64, 64, 4), 255, np.uint8)
    pixels[:, :32, 3] = 0
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / "a.heic", quality=-1)
    back = read_media(tmp_path / "a.heic")
    assert (back[..., :30] < -0.97).all() and (back[..., 34:] > 0.97).all()
    grey = np.full((64, 64, 3), 0x8000, np.uint16)
    pillow_heif.from_bytes("RGB;16", (64, 64), grey.tobytes()).save(tmp_path / "b.heic", quality=-1)
    assert read_media(tmp_path / "b.heic").abs().max() < 0.02


def test_reading_heic_registers_nothing_in_pillow(tmp_path: Path) -> None:
    pillow_heif.from_pillow(Image.new("RGB", (64, 64))).save(tmp_path / "a.heic")
    Image.init()
    before = dict(Image.OPEN), dict(Image.EXTENSION)
    read_media(tmp_path / "a.heic")
    assert before == (Image.OPEN, Image.EXTENSION)


def test_without_its_reader_an_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif.from_pillow(Image.new("RGB", (64, 64))).save(tmp_path / "a.heic")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.avif")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(images.features, "check", lambda _: False)
    for name, reason in (("a.heic", "an HEIF image; `pip install pillow-heif`"), ("a.avif", "an AVIF image; Pillow")):
        with pytest.raises(UnreadableMedia) as raised:
            read_media(tmp_path / name)
        assert raised.value.reason.startswith(reason)


def test_an_absurd_heic_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif.from_pillow(Image.new("RGB", (64, 64))).save(tmp_path / "a.heic")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableMedia, match="too large an image: 4096 pixels"):
        read_media(tmp_path / "a.heic")


def _save_all(path: Path, durations: list[int], **options: object) -> Path:
    first, *others = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    first.save(path, save_all=True, append_images=others, duration=durations, **options)
    return path


ANIMATED = [
    ("gif", lambda path, durations: _save_all(path, durations)),
    ("webp", lambda path, durations: _save_all(path, durations, lossless=True)),
    ("png", lambda path, durations: _save_all(path, durations)),
    ("avif", lambda path, durations: _save_all(path, durations, quality=95)),
]


def _colours(path: Path, **options: float) -> str:
    """A letter a frame: r, g or b."""
    return "".join("rgb"[channel] for channel in read_media(path, **options)[:, :, 8, 8].argmax(dim=0))


@pytest.mark.parametrize(("suffix", "save"), ANIMATED, ids=[suffix for suffix, _ in ANIMATED])
def test_a_picture_lasts_as_long_as_the_file_says(
    tmp_path: Path, suffix: str, save: Callable[[Path, list[int]], Path]
) -> None:
    path = save(tmp_path / f"a.{suffix}", [100, 100, 2000])
    assert _colours(path) == "rgb"
    assert _colours(path, fps=2) == "rbbbb"
    assert _colours(path, fps=10) == "rg" + 20 * "b"
    assert _colours(path, fps=10, max_frames=4) == "rgbb"
    assert read_clip(path).fps == pytest.approx(3 / 2.2, rel=0.01)
    assert read_clip(path, max_frames=2).fps == pytest.approx(10, rel=0.01)
    even = save(tmp_path / f"b.{suffix}", [40, 40, 40])
    assert read_clip(even).fps == pytest.approx(25, rel=0.01)


def test_the_picture_shown_instead_of_an_animated_png_is_no_frame(tmp_path: Path) -> None:
    path = _save_all(tmp_path / "a.png", [100, 100], default_image=True)
    assert _colours(path) == "gb"


def test_a_picture_of_a_minute_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = _save_all(tmp_path / "a.webp", [100, 100, 65_000])
    with pytest.raises(UnreadableMedia, match=r"one picture lasts for more than .* frames: give max_frames"):
        read_media(path, fps=1e6)
    assert read_media(path, fps=1e6, max_frames=5).shape[1] == 5
    Image.new("RGB", (16, 16)).save(tmp_path / "still.gif", duration=65_000)
    assert read_media(tmp_path / "still.gif", fps=1000).shape[1] == 1
