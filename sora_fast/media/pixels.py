"""Pillow's images of every mode, depth and colour profile, as RGB of 8 bits in sRGB, upright and on black."""

import io
import logging
from functools import cache

import numpy as np
from PIL import Image, ImageCms, ImageOps

log = logging.getLogger(__name__)

SRGB = ImageCms.createProfile("sRGB")
BITS_PER_SAMPLE, SAMPLE_FORMAT = 258, 339  # tags of TIFF
SIGNED = 2


class UnknownRange(ValueError):
    """Numbers of which nobody says what white is."""


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits a channel, in sRGB, turned upright; what is transparent lies on black.

    Raises UnknownRange for numbers (32 bits, floating point) that do not say what black and white are.
    """
    image.load()
    upright = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
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
    shares = _floats(values) if upright.mode == "F" else _integers(values, upright.mode, original)
    levels = np.rint(shares * 255).astype(np.uint8)
    if values.max() > 0 and levels.max() == 0:
        raise UnknownRange(f"values of up to {values.max():g} only, far too dark for the range of their format")
    hidden = original.info.get("transparency")
    alpha = None if hidden is None else Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8))
    return Image.fromarray(levels), alpha


def _floats(values: np.ndarray) -> np.ndarray:
    if not (values.min() >= 0 and values.max() <= 1):  # false for NaN, too
        raise UnknownRange(
            f"floating-point values from {values.min():g} to {values.max():g}: nothing says which of them is white, "
            "unless all are between 0 (black) and 1 (white)"
        )
    return values


def _integers(values: np.ndarray, mode: str, original: Image.Image) -> np.ndarray:
    tags = getattr(original, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]  # formats other than TIFF are scaled to 16 bits by Pillow itself
    if tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED:
        bits -= 1
        if values.min() < 0:
            raise UnknownRange(f"values from {values.min()} to {values.max()}: nothing says which of them is black")
    elif bits == 32:
        values = values.view(np.uint32)  # Pillow knows signed ones only
    return values.astype(np.float64) / (2**bits - 1)


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
