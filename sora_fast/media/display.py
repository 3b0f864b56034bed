"""FFmpeg's frames as they are to be shown: in sRGB, on black, with square pixels, upright."""

import re
from fractions import Fraction

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation
from PIL import Image

from sora_fast.media.pixels import UnknownRange, on_black

# Of swscale's ways to make RGB from more than 8 bits the default is not exact: white comes as 253.
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

UNTAGGED = {2, 3}  # "unspecified" and "reserved"
# Brought to BT.709, as which all other videos are taken. PQ and HLG are high dynamic range.
OTHER_TRANSFERS = {ColorTrc.LINEAR, ColorTrc.SMPTE2084, ColorTrc.SMPTE428, ColorTrc.ARIB_STD_B67}
OTHER_PRIMARIES = {
    ColorPrimaries.BT2020,
    ColorPrimaries.SMPTE428,
    ColorPrimaries.SMPTE431,
    ColorPrimaries.SMPTE432,
}

UNKNOWN_SIDE_DATA = sorted(set(range(48)) - {kind.value for kind in Type})


def to_image(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> Image.Image:
    """pixel_aspect: width of a pixel by its height; None where the file says nothing.

    Raises UnknownRange for floating-point frames, and FFmpegError for colours that swscale does not know.
    """
    if re.search(r"f(16|32)", frame.format.name):
        raise UnknownRange(f"floating-point values ({frame.format.name}): nothing says which of them is white")
    return _upright(_square(_to_rgb(frame), pixel_aspect), frame)


def _to_rgb(frame: av.VideoFrame) -> Image.Image:
    deep = max(component.bits for component in frame.format.components) > 8
    options = _colours(frame) | ({"interpolation": EXACT} if deep else {})
    if not (frame.format.has_palette or any(component.is_alpha for component in frame.format.components)):
        return Image.fromarray(frame.to_ndarray(format="rgb24", **options))
    layer = Image.fromarray(frame.to_ndarray(format="rgba", **options))
    return on_black(layer.convert("RGB"), layer.getchannel("A"))


def _colours(frame: av.VideoFrame) -> dict[str, int]:
    """What swscale must be told to make RGB of BT.709's primaries and transfer."""
    options = {}
    if frame.colorspace in UNTAGGED and not frame.format.is_rgb:
        large = frame.width >= 1280 or frame.height > 576  # as players guess
        options["src_colorspace"] = Colorspace.ITU709 if large else Colorspace.ITU601
    if frame.color_trc in OTHER_TRANSFERS or frame.color_primaries in OTHER_PRIMARIES:
        options |= {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}
    return options


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
