"""FFmpeg's frames as they are to be shown: in sRGB, on black, with square pixels, upright."""

import re
from fractions import Fraction
from functools import cache

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from PIL import Image, ImageFilter

from sora_fast.media.pixels import Unshowable, on_black

# Of swscale's ways to make RGB from more than 8 bits the default is not exact: white comes as 253.
EXACT = 0x2 | 0x40000 | 0x2000  # bilinear, accurate rounding, full chroma; PyAV 17 has no names for the latter two

UNTAGGED = {2, 3}  # "unspecified" and "reserved"
# Brought to BT.709, as which all other videos are taken. PQ and HLG are high dynamic range. Not "linear": FFmpeg 5
# wrote that into every DPX, whatever was in it.
OTHER_TRANSFERS = {ColorTrc.SMPTE2084, ColorTrc.SMPTE428, ColorTrc.ARIB_STD_B67}
OTHER_PRIMARIES = {
    ColorPrimaries.BT2020,
    ColorPrimaries.SMPTE428,
    ColorPrimaries.SMPTE431,
    ColorPrimaries.SMPTE432,
}
GRID = 65  # steps of each channel, the most that Pillow takes; what lies between is interpolated

UNKNOWN_SIDE_DATA = sorted(set(range(48)) - {kind.value for kind in Type})


def to_image(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> Image.Image:
    """pixel_aspect: width of a pixel by its height; None where the file says nothing.

    Raises Unshowable for floating-point frames and for colours that swscale does not know.
    """
    if re.search(r"f(16|32)", frame.format.name):
        raise Unshowable(f"floating-point values ({frame.format.name}): nothing says which of them is white")
    try:
        image = _to_rgb(frame)
    except av.error.FFmpegError as error:
        kind = f"matrix {frame.colorspace}, primaries {frame.color_primaries}, transfer {frame.color_trc}"
        raise Unshowable(f"colours of a kind that FFmpeg does not convert ({frame.format.name}, {kind})") from error
    return _upright(_square(image, pixel_aspect), frame)


def _to_rgb(frame: av.VideoFrame) -> Image.Image:
    options = {}
    if max(component.bits for component in frame.format.components) > 8:
        options["interpolation"] = EXACT
    if frame.colorspace in UNTAGGED and not frame.format.is_rgb:
        large = frame.width >= 1280 or frame.height > 576  # as players guess
        options["src_colorspace"] = Colorspace.ITU709 if large else Colorspace.ITU601
    transparent = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    image = Image.fromarray(frame.to_ndarray(format="rgba" if transparent else "rgb24", **options))
    rgb = image.convert("RGB")
    if frame.color_trc in OTHER_TRANSFERS or frame.color_primaries in OTHER_PRIMARIES:
        rgb = rgb.filter(_to_bt709(frame.color_primaries, frame.color_trc))
    return on_black(rgb, image.getchannel("A")) if transparent else rgb


@cache
def _to_bt709(primaries: int, transfer: int) -> ImageFilter.Color3DLUT:
    """What swscale makes of a grid of colours. It takes seconds to prepare itself: too much for every video."""
    steps = np.rint(np.linspace(0, 255, GRID)).astype(np.uint8)
    blue, green, red = np.meshgrid(steps, steps, steps, indexing="ij")  # red changes fastest, as Pillow wants it
    grid = np.stack([red, green, blue], axis=-1).reshape(GRID, GRID * GRID, 3)
    frame = av.VideoFrame.from_ndarray(grid, format="rgb24")
    frame.color_primaries, frame.color_trc = primaries, transfer
    shown = frame.to_ndarray(format="rgb48le", dst_color_primaries=ColorPrimaries.BT709, dst_color_trc=ColorTrc.BT709)
    if np.abs(shown / 257 - grid).max() < 2:  # older ones only write down what they should convert
        raise Unshowable("wide gamut or high dynamic range, which needs PyAV 18")
    return ImageFilter.Color3DLUT(GRID, (shown / 65535).ravel().tolist())


def _square(image: Image.Image, pixel_aspect: Fraction | None) -> Image.Image:
    """The height stays, the width is scaled, as players do."""
    width = round(image.width * (pixel_aspect or 1))
    if width == image.width:
        return image
    if width * image.height > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"pixels of aspect {pixel_aspect} make {width} × {image.height} square ones")
    return image.resize((max(1, width), image.height), Image.Resampling.LANCZOS)


def _upright(image: Image.Image, frame: av.VideoFrame) -> Image.Image:
    """The display matrix (a b u, c d v, x y w) shows the pixel (x, y) at (a·x + c·y, b·x + d·y)."""
    matrix = _known_side_data(frame).get(Type.DISPLAYMATRIX)
    if matrix is None:
        return image
    a, b, _, c, d, *_ = np.frombuffer(matrix, dtype=np.int32).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):  # of slanted ones, the nearest of the eight
        image, a, d = image.transpose(Image.Transpose.TRANSPOSE), c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image


def _known_side_data(frame: av.VideoFrame) -> SideDataContainer:
    try:
        return frame.side_data
    except ValueError:  # PyAV stumbles over kinds that it does not know, such as EXIF
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 25)
        )
        deleting = [graph.add("sidedata", f"mode=delete:type={kind}") for kind in UNKNOWN_SIDE_DATA]
        graph.link_nodes(source, *deleting, graph.add("buffersink")).configure()
        graph.push(frame)
        return graph.pull().side_data
