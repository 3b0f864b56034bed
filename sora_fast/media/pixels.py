"""Pillow's images of every mode, depth and colour profile, as RGB of 8 bits in sRGB, upright and on black."""

import io
import logging
from functools import cache

import numpy as np
from PIL import Image, ImageCms, ImageOps

log = logging.getLogger(__name__)

SRGB = ImageCms.createProfile("sRGB")
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO, SIGNED = 0, 2


class Unshowable(ValueError):
    """Pixels of which nothing says, or nobody here knows, what colours they are."""


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits a channel, in sRGB, turned upright; what is transparent lies on black.

    Colours come from an ICC profile; without one they are taken as sRGB (PNG's gAMA and cHRM are not looked at).
    Raises Unshowable for numbers (32 bits, floating point) of which nothing says what black and white are.
    """
    image.load()
    upright = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F" or _tag(image, SAMPLE_FORMAT) == SIGNED:
        shown, alpha = _eight_bits(upright, image)
    else:
        shown = upright
        alpha = upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None
    rgb = _to_srgb(shown, profile, getattr(image, "filename", ""))
    return rgb if alpha is None else on_black(rgb, alpha)


def on_black(rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    return Image.composite(rgb, Image.new("RGB", rgb.size), alpha)


def _eight_bits(upright: Image.Image, original: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 8 bits, which Pillow would clip instead of scaling, and the opacity, if a value stands for none."""
    values = np.asarray(upright)
    shares = _floats(values) if upright.mode == "F" else _integers(values, original)
    if values.dtype.itemsize == 4 and values.max() > 0 and shares.max() * 255 < 0.5:  # surely of a smaller range
        raise Unshowable(f"values of up to {values.max():g} only, far too dark for the range of their format")
    if _tag(original, PHOTOMETRIC) == WHITE_IS_ZERO:
        shares = 1 - shares
    hidden = original.info.get("transparency")
    alpha = None if hidden is None else Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8))
    return Image.fromarray(np.rint(shares * 255).astype(np.uint8)), alpha


def _floats(values: np.ndarray) -> np.ndarray:
    if not (values.min() >= 0 and values.max() <= 1):  # false for NaN, too
        raise Unshowable(
            f"floating-point values from {values.min():g} to {values.max():g}: nothing says which of them is white, "
            "unless all are between 0 (black) and 1 (white)"
        )
    return values


def _integers(values: np.ndarray, original: Image.Image) -> np.ndarray:
    bits = _tag(original, BITS_PER_SAMPLE) or 16  # formats other than TIFF are scaled to 16 bits by Pillow itself
    signed = _tag(original, SAMPLE_FORMAT) == SIGNED
    values = values.astype(f"i{bits // 8}" if signed else "u4")  # Pillow knows no unsigned numbers of 32 bits
    if values.min() < 0:
        raise Unshowable(f"values from {values.min()} to {values.max()}: nothing says which of them is black")
    return values / np.float64(2 ** (bits - signed) - 1)


def _tag(image: Image.Image, number: int) -> int | None:
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value


def _to_srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    if image.mode == "LAB":
        return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), SRGB, outputMode="RGB")
    image = image.convert({"CMYK": "CMYK", "L": "L", "LA": "L", "La": "L"}.get(image.mode, "RGB"))
    if profile is not None:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
        except (OSError, ImageCms.PyCMSError) as error:
            _say_unused(name, str(error))
    return image.convert("RGB")


@cache  # once a file
def _say_unused(name: str, reason: str) -> None:
    log.warning("%s: its colour profile cannot be used (%s); taken as sRGB", name, reason)
