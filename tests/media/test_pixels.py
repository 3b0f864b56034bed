import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from sora_fast.media import UnreadableMedia, read_media
from tests.media.files import UPRIGHT, four_corners

HALF_LEVEL = 0.51 / 127.5
SHARES = np.tile([0, 0.25, 0.5, 0.75, 1.0], (4, 1))  # of white


def _levels(path: Path) -> list[list[float]]:
    """The first row of each channel, in levels of 8 bits; of grey pictures, one channel."""
    rows = (read_media(path)[:, 0, 0] + 1) * 127.5
    return rows[:1].tolist() if (rows == rows[0]).all() else rows.tolist()


def _tiff(path: Path, values: np.ndarray, *, white_is_zero: bool = False, bits: int | None = None) -> Path:
    """One grey picture, as TIFF's specification says: Pillow does not write all of what it reads."""
    data, kind = values.tobytes(), values.dtype
    height, width = values.shape
    order = ">" if kind.byteorder == ">" else "<"
    entries = {
        256: ("I", width),
        257: ("I", height),
        258: ("H", bits or kind.itemsize * 8),
        259: ("H", 1),  # not compressed
        262: ("H", 0 if white_is_zero else 1),
        273: ("I", 10 + 9 * 12 + 4),  # where the data are
        277: ("H", 1),
        279: ("I", len(data)),
        339: ("H", {"u": 1, "i": 2, "f": 3}[kind.kind]),
    }
    fields = [
        struct.pack(f"{order}HHI", tag, 3 if letter == "H" else 4, 1)
        + struct.pack(f"{order}{letter}", value).ljust(4, b"\0")
        for tag, (letter, value) in entries.items()
    ]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(fields))
    path.write_bytes(head + b"".join(fields) + bytes(4) + data)
    return path


@pytest.mark.parametrize("magic", ["P2", "P5", "P6"])
@pytest.mark.parametrize("white", [1, 15, 255, 1023, 4095, 65535])
def test_netpbm_is_scaled_by_its_own_white(tmp_path: Path, magic: str, white: int) -> None:
    values = np.rint(SHARES * white).astype(">u2" if white > 255 else np.uint8)
    if magic == "P2":
        content = " ".join(map(str, values.ravel())).encode()
    else:
        content = (values if magic == "P5" else np.repeat(values[..., None], 3, axis=2)).tobytes()
    (tmp_path / "a.pnm").write_bytes(f"{magic}\n5 4\n{white}\n".encode() + content)
    assert _levels(tmp_path / "a.pnm")[0] == pytest.approx(np.rint(values[0] / white * 255), abs=0.01)


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i1", "<u2", ">u2", "<i2", "<u4", "<i4", ">i4", "<f4", ">f4"])
def test_tiff_is_scaled_by_the_range_of_its_numbers(tmp_path: Path, kind: str, white_is_zero: bool) -> None:
    white = 1 if "f" in kind else np.iinfo(kind).max
    values = np.array(SHARES * white, dtype=kind)
    shares = values[0].astype(np.float64) / white
    path = _tiff(tmp_path / "a.tif", values, white_is_zero=white_is_zero)
    if white_is_zero and kind not in ("u1", "<u2", "<f4", ">f4"):  # Pillow does not know the inverted form of these
        with pytest.raises(UnreadableMedia, match="a TIFF of a kind that Pillow does not read"):
            read_media(path)
    else:
        assert _levels(path)[0] == pytest.approx(255 * (1 - shares if white_is_zero else shares), abs=0.51)


def test_tiff_of_twelve_bits(tmp_path: Path) -> None:
    values = [0, 1024, 2048, 3072, 4095, 4095]
    packed = bytes(
        byte
        for a, b in zip(values[::2], values[1::2], strict=True)
        for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255)
    )
    path = _tiff(tmp_path / "a.tif", np.frombuffer(packed, np.uint8)[None], bits=12)
    content = bytearray(path.read_bytes())
    content[18:22] = struct.pack("<I", len(values))  # the width in the first field
    path.write_bytes(content)
    assert _levels(path)[0] == pytest.approx([value / 4095 * 255 for value in values], abs=0.51)


def test_png_of_sixteen_bits(tmp_path: Path) -> None:
    Image.fromarray(np.rint(SHARES * 65535).astype(np.uint16)).save(tmp_path / "a.png")
    assert _levels(tmp_path / "a.png")[0] == pytest.approx(np.rint(SHARES[0] * 255), abs=0.01)


def test_a_dark_picture_of_a_known_range_is_dark(tmp_path: Path) -> None:
    Image.fromarray(np.uint16([[0, 100, 127]])).save(tmp_path / "a.png")
    assert (read_media(tmp_path / "a.png") == -1).all()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.float32([[0, 1, 300]]), "floating-point values from 0 to 300: nothing says which of them is white"),
        (np.float32([[-1, 0, 1]]), "floating-point values from -1 to 1"),
        (np.float32([[0, np.nan, 1]]), "floating-point values from nan to nan"),
        (np.int32([[-5, 0, 2**31 - 1]]), "values from -5 to 2147483647: nothing says which of them is black"),
        (np.int32([[0, 100, 255]]), "values of up to 255 only, far too dark"),
    ],
)
def test_numbers_of_no_known_range_are_refused(tmp_path: Path, values: np.ndarray, reason: str) -> None:
    with pytest.raises(UnreadableMedia) as raised:
        read_media(_tiff(tmp_path / "a.tif", values))
    assert raised.value.reason.startswith(reason)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_shows_its_colours(tmp_path: Path, mode: str) -> None:
    red, grey = Image.new("RGB", (5, 4), (200, 40, 40)), Image.new("L", (5, 4), 128)
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image, expected = ImageCms.applyTransform(red, to_lab), (200, 40, 40)
    elif mode == "1":
        image, expected = Image.new("1", (5, 4), 1), (255, 255, 255)
    elif mode in ("L", "LA"):
        image, expected = grey.convert(mode), (128, 128, 128)
    else:
        image, expected = red.convert(mode, palette=Image.Palette.ADAPTIVE), (200, 40, 40)
    suffix = {"CMYK": "tif", "LAB": "tif", "YCbCr": "jpg"}.get(mode, "png")
    image.save(path := tmp_path / f"a.{suffix}")
    shown = (read_media(path)[:, 0, 1, 1] + 1) * 127.5
    assert shown.tolist() == pytest.approx(expected, abs=2.1)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "gif", "avif"])
def test_transparency_lies_on_black(tmp_path: Path, suffix: str) -> None:
    pixels = np.full((16, 16, 4), 255, np.uint8)
    pixels[:, :8, 3] = 0  # white, but not to be seen
    Image.fromarray(pixels).save(path := tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    video = read_media(path)
    assert (video[..., :7] < -0.97).all() and (video[..., 9:] > 0.97).all()


def test_a_grey_value_that_stands_for_transparent(tmp_path: Path) -> None:
    pixels = np.full((4, 5), 0x8000, np.uint16)
    pixels[:, 2:] = 0xFFFF
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=0xFFFF)
    assert _levels(tmp_path / "a.png")[0] == [128, 128, 0, 0, 0]


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
def test_eight_orientations(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(four_corners()).save(path := tmp_path / f"a.{suffix}", exif=exif)
    expected = torch.from_numpy(UPRIGHT[orientation](four_corners()) / 127.5 - 1).permute(2, 0, 1)[:, None]
    back = read_media(path)
    assert back.shape == expected.shape
    assert (back - expected).abs().mean() < 0.05


def test_orientation_of_sixteen_bits(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.uint16([[0, 0xFFFF]])).save(tmp_path / "a.png", exif=exif)
    assert read_media(tmp_path / "a.png")[0, 0].tolist() == [[-1], [1]]


# Colour profiles. The columns are the primaries as XYZ under D50, as the published profiles have them.
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def _profile(primaries: np.ndarray, gamma: float = 2.2) -> bytes:
    """An ICC profile of version 2: three primaries and one gamma."""

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    text = b"P3\0"
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(79),
        b"wtpt": xyz(np.array([0.9642, 1.0, 0.8249])),
        **{name: xyz(primaries[:, index]) for index, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    size = 128 + len(table) + len(data)
    head = struct.pack(
        ">I4xI4s4s4s12x4s28x3i", size, 0x02100000, b"mntr", b"RGB ", b"XYZ ", b"acsp", 63190, 65536, 54061
    )
    return head.ljust(128, b"\0") + table + data


def _as_srgb(colour: tuple[int, int, int]) -> np.ndarray:
    linear = np.linalg.inv(SRGB) @ DISPLAY_P3 @ (np.array(colour) / 255) ** 2.2
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("colour", [(200, 100, 80), (90, 160, 120), (255, 255, 255), (0, 0, 0), (0, 255, 0)])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
def test_colours_of_display_p3_become_srgb(tmp_path: Path, suffix: str, colour: tuple[int, int, int]) -> None:
    options = {"icc_profile": _profile(DISPLAY_P3)} | ({"lossless": True} if suffix == "webp" else {"quality": 100})
    Image.new("RGB", (16, 16), colour).save(path := tmp_path / f"a.{suffix}", **options)
    shown = (read_media(path)[:, 0, 8, 8] + 1) * 127.5
    assert shown.tolist() == pytest.approx(_as_srgb(colour), abs=2.5)


def test_a_profile_leaves_transparency_and_srgb_as_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "tagged.png", icc_profile=srgb)
    plain, tagged = read_media(tmp_path / "plain.png"), read_media(tmp_path / "tagged.png")
    assert (plain - tagged).abs().max() <= 1.01 / 127.5


def test_a_broken_profile_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (5, 4), (200, 40, 40)).save(tmp_path / "a.png", icc_profile=b"no profile")
    for _ in range(2):
        assert ((read_media(tmp_path / "a.png")[:, 0, 0, 0] + 1) * 127.5).tolist() == pytest.approx([200, 40, 40])
    (message,) = caplog.messages
    assert "a.png: its colour profile cannot be used" in message
