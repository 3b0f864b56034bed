import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorPrimaries, ColorTrc
from PIL import Image

from sora_fast.media import UnreadableMedia, display, read_media
from tests.media.files import UPRIGHT, four_corners, write_video

ONE = 1 << 16
# Where QuickTime shows the pixel (x, y): at (a·x + c·y, b·x + d·y). By orientation of EXIF: (a, b, c, d).
MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def _as_video(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures) / 127.5 - 1).permute(3, 0, 1, 2)


def _levels(path: Path, row: int = 8, column: int = 8) -> list[float]:
    return ((read_media(path)[:, 0, row, column] + 1) * 127.5).tolist()


def _mux(path: Path, codec: str, format: str, picture: bytes) -> None:
    """A video of one frame of 48 × 32, which is a whole file of another kind."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, format
        packet = av.Packet(picture)
        packet.stream, packet.pts, packet.dts, packet.duration = stream, 0, 0, 1
        packet.time_base = Fraction(1, 8)
        container.start_encoding()
        container.mux(packet)


@pytest.mark.parametrize("orientation", MATRICES)
def test_eight_display_matrices(tmp_path: Path, orientation: int) -> None:
    """What the matrices mean was compared once with what the program ffmpeg makes of the same files."""
    pictures = [four_corners(), four_corners() // 2]
    path = write_video(tmp_path / "a.mp4", pictures)
    a, b, c, d = (ONE * value for value in MATRICES[orientation])
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    expected = _as_video([UPRIGHT[orientation](picture) for picture in pictures])
    back = read_media(path)
    assert back.shape == expected.shape
    assert (back - expected).abs().mean() < 0.05


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["mov", "mkv", "avi"])
def test_eight_orientations_of_motion_jpeg(tmp_path: Path, suffix: str, orientation: int) -> None:
    """Their pictures carry EXIF, of which PyAV does not know the kind."""
    exif, jpeg = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(four_corners()).save(jpeg, "jpeg", quality=95, exif=exif)
    _mux(tmp_path / f"a.{suffix}", "mjpeg", "yuvj420p", jpeg.getvalue())
    expected = _as_video([UPRIGHT[orientation](four_corners())])
    back = read_media(tmp_path / f"a.{suffix}")
    assert back.shape == expected.shape
    assert (back - expected).abs().mean() < 0.06


@pytest.mark.parametrize(
    ("aspect", "width"), [(Fraction(2), 96), (Fraction(1, 2), 24), (Fraction(8, 9), 43), (Fraction(1), 48)]
)
@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "h264"), ("mkv", "h264"), ("avi", "mpeg4"), ("ts", "h264")])
def test_pixels_become_square(tmp_path: Path, suffix: str, codec: str, aspect: Fraction, width: int) -> None:
    path = write_video(tmp_path / f"a.{suffix}", [four_corners()] * 2, codec=codec, sample_aspect_ratio=aspect)
    back = read_media(path)
    assert back.shape == (3, 2, 32, width)
    assert (back[:, 0, 8, width // 4] - _as_video([four_corners()])[:, 0, 8, 12]).abs().max() < 0.1
    assert (back[:, 0, 24, 3 * width // 4] - _as_video([four_corners()])[:, 0, 24, 36]).abs().max() < 0.1
    assert max(read_media(path, max_side=20).shape) == 20


def test_an_absurd_aspect_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [four_corners(640, 640)], sample_aspect_ratio=Fraction(600))
    with pytest.raises(UnreadableMedia, match="pixels of aspect 600 make 384000 × 640 square ones"):
        read_media(path)


TRANSPARENT = [
    ("mov", "prores_ks", "yuva444p10le"),
    ("mov", "png", "rgba"),
    ("mov", "qtrle", "argb"),
    ("webm", "libvpx-vp9", "yuva420p"),
    ("webm", "libvpx", "yuva420p"),
    ("mkv", "ffv1", "yuva420p"),
    ("mkv", "ffv1", "bgra"),
    ("nut", "rawvideo", "rgba"),
    ("tga", "targa", "bgra"),
    ("jp2", "jpeg2000", "rgba"),
    ("avi", "utvideo", "gbrap"),
    ("sgi", "sgi", "rgba"),
    ("qoi", "qoi", "rgba"),
]


@pytest.mark.parametrize(("suffix", "codec", "format"), TRANSPARENT)
def test_transparency_lies_on_black(tmp_path: Path, suffix: str, codec: str, format: str) -> None:
    pixels = np.full((32, 48, 4), 255, np.uint8)
    pixels[:, :16, 3], pixels[:, 16:32, 3] = 0, 128  # white, but not to be seen, or half
    path = write_video(tmp_path / f"a.{suffix}", [pixels], codec=codec, format=format, rate=25)
    levels = (read_media(path)[:, 0].mean(dim=(0, 1)) + 1) * 127.5
    assert levels[:12].max() < 4
    assert levels[20:28].tolist() == pytest.approx([128] * 8, abs=4)
    assert levels[36:].min() > 250


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    pixels = np.full((32, 48, 4), 255, np.uint8)
    pixels[:, :24, 3] = 0
    png = io.BytesIO()
    Image.fromarray(pixels).quantize(4).save(png, "png")
    _mux(tmp_path / "a.mov", "png", "pal8", png.getvalue())
    back = read_media(tmp_path / "a.mov")
    assert (back[..., :24] == -1).all() and (back[..., 24:] == 1).all()


# Formats of more than 8 bits.
DEEP = [
    ("mkv", "ffv1", "gray10le"),
    ("mkv", "ffv1", "gray12le"),
    ("mkv", "ffv1", "gray16le"),
    ("mkv", "ffv1", "yuv420p10le"),
    ("mkv", "ffv1", "yuv422p10le"),
    ("mkv", "ffv1", "yuv444p12le"),
    ("mkv", "ffv1", "gbrp10le"),
    ("mkv", "libx265", "yuv420p10le"),
    ("mov", "prores_ks", "yuv422p10le"),
    ("mov", "png", "rgb48be"),
    ("mov", "png", "gray16be"),
    ("dpx", "dpx", "gbrp10le"),
    ("dpx", "dpx", "rgb48be"),
    ("sgi", "sgi", "rgb48be"),
    ("png", "png", "rgb48be"),
    ("png", "png", "rgba64be"),
]


@pytest.mark.parametrize(("suffix", "codec", "format"), DEEP)
def test_more_than_eight_bits(tmp_path: Path, suffix: str, codec: str, format: str) -> None:
    levels = [0, 64, 128, 192, 255]
    picture = np.repeat(np.repeat(np.uint8(levels)[None, :, None], 32, axis=0), 16, axis=1).repeat(3, axis=2)
    path = write_video(tmp_path / f"a.{suffix}", [picture], codec=codec, format=format, rate=25)
    shown = (read_media(path)[:, 0, 16, 8::16] + 1) * 127.5
    for channel in shown.tolist():
        assert channel == pytest.approx(levels, abs=1.01)


@pytest.mark.parametrize(("suffix", "codec"), [("exr", "exr"), ("pfm", "pfm"), ("hdr", "hdr")])
def test_floating_point_is_refused(tmp_path: Path, suffix: str, codec: str) -> None:
    path = write_video(tmp_path / f"a.{suffix}", [four_corners()], codec=codec, format="gbrpf32le", rate=25)
    with pytest.raises(UnreadableMedia, match=r"floating-point values .*: nothing says which of them is white"):
        read_media(path)


# Colours: Y, Cb, Cr in the file, and what the standards say they are.
def _rgb(levels: tuple[int, int, int], red: float, blue: float, full: bool) -> list[float]:
    """`red` and `blue`: what the matrix gives them of the brightness."""
    y, cb, cr = ((levels[0] - 0) / 255, *((level - 128) / 255 for level in levels[1:]))
    if not full:
        y, cb, cr = (levels[0] - 16) / 219, (levels[1] - 128) / 224, (levels[2] - 128) / 224
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    g = (y - red * r - blue * b) / (1 - red - blue)
    return [min(max(255 * value, 0), 255) for value in (r, g, b)]


BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)
MATRICES_OF_COLOUR = [
    ((64, 48), {}, BT601, False),
    ((1280, 720), {}, BT709, False),  # nobody says: as players guess
    ((720, 576), {}, BT601, False),
    ((64, 48), {"colorspace": 1}, BT709, False),
    ((64, 48), {"colorspace": 6}, BT601, False),
    ((1280, 720), {"colorspace": 6}, BT601, False),
    ((64, 48), {"colorspace": 9}, BT2020, False),
    ((64, 48), {"colorspace": 1, "color_range": 2}, BT709, True),
    ((64, 48), {"colorspace": 6, "color_range": 2}, BT601, True),
]


def _plain(path: Path, levels: Sequence[int], size: tuple[int, int], bits: int = 8, **tags: int) -> Path:
    """One frame of one colour, given as Y, Cb, Cr."""
    frame = av.VideoFrame(*size, "yuv420p" if bits == 8 else "yuv420p10le")
    for plane, level in zip(frame.planes, levels, strict=True):
        number = level.to_bytes(1 if bits == 8 else 2, "little")
        plane.update(number * (plane.buffer_size // len(number)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = *size, frame.format.name
        for name, value in tags.items():
            setattr(stream, name, value)
            setattr(frame, name, value)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("size", "tags", "matrix", "full"), MATRICES_OF_COLOUR)
def test_matrix_and_range_of_the_colours(
    tmp_path: Path, size: tuple[int, int], tags: dict[str, int], matrix: tuple[float, float], full: bool
) -> None:
    levels = (120, 110, 150)
    path = _plain(tmp_path / "a.mkv", levels, size, **tags)
    assert _levels(path) == pytest.approx(_rgb(levels, *matrix, full), abs=2.5)


needs_pyav_18 = pytest.mark.skipif(av.__version__ < "18", reason="older PyAV does not convert wide gamut")


class _OlderFrame:
    """PyAV before 18: told to convert, it writes down the new tags and leaves the numbers."""

    @staticmethod
    def from_ndarray(levels: np.ndarray, format: str) -> "_OlderFrame":
        frame = _OlderFrame()
        frame.levels = levels
        return frame

    def to_ndarray(self, **_: object) -> np.ndarray:
        return self.levels.astype(np.uint16) * 257


def test_wide_gamut_is_refused_where_it_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _plain(tmp_path / "a.mkv", (500, 480, 580), (64, 48), bits=10, color_primaries=ColorPrimaries.BT2020)
    monkeypatch.setattr(av, "VideoFrame", _OlderFrame)
    monkeypatch.setattr(display, "_to_bt709", display._to_bt709.__wrapped__)  # which keeps what it made
    with pytest.raises(UnreadableMedia, match="which needs PyAV 18"):
        read_media(path)


def _from_bt2020(r: float, g: float, b: float) -> list[float]:
    """BT.2020's light as BT.709's; the matrix of BT.2087."""
    matrix = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    return (np.array(matrix) @ [r, g, b]).clip(0, 1).tolist()


@needs_pyav_18
def test_wide_gamut_becomes_bt709(tmp_path: Path) -> None:
    tags = {"colorspace": 9, "color_primaries": ColorPrimaries.BT2020, "color_trc": ColorTrc.BT2020_10}
    levels = (500, 480, 580)
    path = _plain(tmp_path / "a.mkv", levels, (64, 48), bits=10, **tags)
    light = [(level / 255) ** 2.4 for level in _rgb(tuple(level / 4 for level in levels), *BT2020, full=False)]
    expected = [255 * value ** (1 / 2.4) for value in _from_bt2020(*light)]
    assert _levels(path) == pytest.approx(expected, abs=4)


def _pq(nits: float) -> int:
    """SMPTE ST 2084, in 10 bits of limited range."""
    power = (nits / 10_000) ** 0.1593017578125
    share = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    return round(64 + 876 * share)


@needs_pyav_18
def test_high_dynamic_range_is_brought_down(tmp_path: Path) -> None:
    tags = {"colorspace": 9, "color_primaries": ColorPrimaries.BT2020, "color_trc": ColorTrc.SMPTE2084}
    shown = [
        _levels(_plain(tmp_path / "a.mkv", (_pq(nits), 512, 512), (64, 48), bits=10, **tags))[0]
        for nits in (0, 5, 50, 203, 1000)
    ]
    # BT.2408: the white of paper is at 203 nits. What is brighter has little room left.
    assert shown[0] == 0 and shown == sorted(shown)
    assert shown[3] > 215 and shown[4] > 250
    assert shown[2] == pytest.approx(255 * (50 / 203) ** (1 / 2.4), abs=15)


def test_colours_that_swscale_does_not_know_are_refused(tmp_path: Path) -> None:
    path = _plain(tmp_path / "a.mkv", (100, 90, 180), (64, 48), colorspace=8)  # YCgCo
    with pytest.raises(UnreadableMedia, match="colours of a kind that FFmpeg does not convert"):
        read_media(path)


def test_the_transfer_that_every_dpx_claims_is_not_believed(tmp_path: Path) -> None:
    """FFmpeg 5 and others write "linear" whatever is in it; taken for that, it was brighter by 30 levels."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    encoder = av.CodecContext.create("dpx", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, "rgb24"
    encoder.time_base = Fraction(1, 8)
    content = bytearray(b"".join(bytes(packet) for packet in (*encoder.encode(frame), *encoder.encode())))
    content[801] = 2  # SMPTE 268M: transfer characteristic, linear
    (tmp_path / "a.dpx").write_bytes(content)
    torch.testing.assert_close(read_media(tmp_path / "a.dpx"), _as_video([picture]).float())
