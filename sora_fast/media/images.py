"""Images that Pillow reads better than FFmpeg does: it notices truncation, and knows transparency and colours."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageSequence, UnidentifiedImageError, features

from sora_fast.media.frames import Frame, UnreadableMedia
from sora_fast.media.pixels import Unshowable, to_rgb
from sora_fast.media.whole import check_boxes

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
ANIMATED_FORMATS = ("PNG", "GIF", "WEBP", "AVIF")  # in others a second picture is a thumbnail or the other eye
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"mif1", b"mif2"}  # still images; sequences are FFmpeg's
MOTION_JPEG = (".mjpeg", ".mjpg")  # one JPEG after the other, of which Pillow sees the first
TIFF = (b"II*\0", b"MM\0*")

ORIENTATION = 0x0112  # of EXIF: from 5 on, width and height are exchanged

DEFAULT_SECONDS = 0.1  # what browsers show a frame for that asks for no time at all


def image_frames(path: Path) -> Iterator[Frame] | None:
    """The pictures of an image file; None if it is of no format that Pillow is to read."""
    try:
        image = _open(path)
    except UnreadableMedia:
        raise
    except Exception as error:  # Pillow's parsers raise whatever they stumble over: IndexError, struct.error, …
        raise UnreadableMedia(path, _reason(error)) from error
    return None if image is None else _pages(path, image)


def still_size(path: Path) -> tuple[int, int] | None:
    """Height and width of a still image as it is to be seen, from its header; None where that does not say."""
    try:
        with _open(path) as image:  # an AttributeError if it is none
            if image.format not in FORMATS or (image.format in ANIMATED_FORMATS and image.is_animated):
                return None
            # Of PNGs that have it behind the pixels, reading it would decode them.
            exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
            turned = exif.get(ORIENTATION, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # who decodes it will say what is wrong
        return None


def _open(path: Path) -> Image.Image | None:
    brands = _brands(path)
    # These may be grids of tiles, which FFmpeg takes for as many videos: whole, or not at all.
    if b"avif" in brands or b"avis" in brands:
        if not features.check("avif"):
            raise UnreadableMedia(path, "an AVIF image; Pillow ≥ 11.3 with AVIF support is needed to read it")
        return Image.open(path, formats=("AVIF",))
    if brands and brands[0] in HEIF_BRANDS:
        return _open_heif(path)
    if path.suffix.lower() in MOTION_JPEG:
        return None
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        if _head(path)[:4] in TIFF:  # FFmpeg takes signed numbers for unsigned ones
            raise UnreadableMedia(path, "a TIFF of a kind that Pillow does not read, or corrupt") from None
        return None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(256)


def _brands(path: Path) -> list[bytes]:
    """What a file of the ISO base media format (MP4, HEIF, AVIF) says it is, the major brand first."""
    head = _head(path)
    if head[4:8] != b"ftyp":
        return []
    words = [head[start : start + 4] for start in range(8, min(len(head), int.from_bytes(head[:4], "big")), 4)]
    return words[:1] + words[2:]  # the second word is a version


def _open_heif(path: Path) -> Image.Image:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise UnreadableMedia(path, "an HEIF image; `pip install pillow-heif` to read it") from None
    check_boxes(path)
    image = HeifImageFile(path)  # opened without registering a plug-in in Pillow, which is the application's business
    if image.width * image.height > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width * image.height} pixels")
    return image


def _pages(path: Path, image: Image.Image) -> Iterator[Frame]:
    try:
        with image:
            if image.format in ANIMATED_FORMATS and image.is_animated:
                yield from _animation(image)
            else:
                yield Frame(to_rgb(image))
    except Exception as error:
        raise UnreadableMedia(path, _reason(error)) from error


def _animation(image: Image.Image) -> Iterator[Frame]:
    start = 0.0
    for page in ImageSequence.Iterator(image):
        if page.tell() == 0 and getattr(image, "default_image", False):  # what is shown instead of an animated PNG
            continue
        rgb = to_rgb(page)
        if image.format == "AVIF":  # its durations are rounded to milliseconds, and would add up to too much
            start = page.info["timestamp"] / 1000
        end = start + (page.info.get("duration", 0) / 1000 or DEFAULT_SECONDS)
        yield Frame(rgb, start, end)
        start = end


def _reason(error: Exception) -> str:
    if isinstance(error, Unshowable):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:  # Pillow's own have no number
        return f"cannot be read: {error.strerror}"
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return f"too large an image: {error}"
    return f"corrupt or truncated image: {error}"
