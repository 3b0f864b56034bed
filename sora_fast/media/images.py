"""Images that Pillow reads better than FFmpeg does: it notices truncation, and knows orientation and transparency."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from sora_fast.media.frames import Frame, UnreadableMedia

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
ANIMATED_FORMATS = ("PNG", "GIF", "WEBP")  # in others a second picture is a thumbnail or the other eye

DEFAULT_SECONDS = 0.1  # what browsers show a frame for that asks for no time at all


def image_frames(path: Path) -> Iterator[Frame] | None:
    """The pictures of an image file; None if it is of no format that Pillow is to read."""
    try:
        image = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        return None
    except Exception as error:  # Pillow's parsers raise whatever they stumble over: IndexError, struct.error, …
        raise UnreadableMedia(path, _reason(error)) from error
    return _pages(path, image)


def _pages(path: Path, image: Image.Image) -> Iterator[Frame]:
    try:
        with image:
            if image.format not in ANIMATED_FORMATS or not image.is_animated:
                yield Frame(_to_rgb(image))
                return
            start = 0.0
            for page in ImageSequence.Iterator(image):
                page.load()
                end = start + (page.info.get("duration", 0) / 1000 or DEFAULT_SECONDS)
                yield Frame(_to_rgb(page), start, end)
                start = end
    except Exception as error:
        raise UnreadableMedia(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:  # Pillow's own have no number
        return f"cannot be read: {error.strerror}"
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return f"too large an image: {error}"
    return f"corrupt or truncated image: {error}"


def _to_rgb(page: Image.Image) -> Image.Image:
    page.load()
    return _on_black(ImageOps.exif_transpose(page))


def _on_black(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer).convert("RGB")
