"""Many clips on one sheet, a row each."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sora_fast.media.write import to_pixels

PAPER, INK, PALE, GIVEN = "#ffffff", "#222222", "#888888", "#1f77b4"
GAP = 4  # pixels between frames
MARGIN = 16
FONT, FONT_SIZE = "DejaVu Sans", 14  # matplotlib carries it, and it has more signs than Pillow's own


@dataclass(frozen=True, eq=False)
class Strip:
    """One row of a sheet: a (C, T, H, W) video in [-1, 1], its caption, and how many frames at its ends were given."""

    caption: str
    video: Tensor
    head: int = 0
    tail: int = 0


def contact_sheet(strips: Sequence[Strip], path: str | PathLike[str], *, columns: int = 8, scale: int = 4) -> Path:
    """Draws a PNG with a clip a row: caption, then up to `columns` frames evenly spread from the first to the last.

    Frames are scaled up by the whole number `scale` and numbered; those that the model was given have a blue frame.
    """
    if not strips:
        raise ValueError("strips must not be empty")
    if columns < 2 or scale < 1:
        raise ValueError(f"columns must be at least 2 and scale at least 1, got {columns} and {scale}")
    font = ImageFont.truetype(findfont(FONT), FONT_SIZE)
    rows = [_draw_strip(strip, columns, scale, font) for strip in strips]
    sheet = Image.new(
        "RGB", (max(row.width for row in rows) + 2 * MARGIN, sum(row.height + MARGIN for row in rows) + MARGIN), PAPER
    )
    top = MARGIN
    for row in rows:
        sheet.paste(row, (MARGIN, top))
        top += row.height + MARGIN
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _draw_strip(strip: Strip, columns: int, scale: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    pixels = to_pixels(strip.video).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width = pixels.shape[:3]
    shown = np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int))
    line = FONT_SIZE + GAP
    measure = int(np.ceil(font.getlength(strip.caption)))
    row = Image.new("RGB", (max(measure, len(shown) * (width + 2 * GAP)), height + 2 * line + 2 * GAP), PAPER)
    draw = ImageDraw.Draw(row)
    draw.text((GAP, 0), strip.caption, fill=INK, font=font)
    for place, index in enumerate(shown):
        left, top = GAP + place * (width + 2 * GAP), line + GAP
        given = index < strip.head or index >= count - strip.tail
        if given:
            draw.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), fill=GIVEN)
        row.paste(Image.fromarray(pixels[index].squeeze(-1) if pixels.shape[-1] == 1 else pixels[index]), (left, top))
        draw.text((left, top + height + GAP), str(index), fill=GIVEN if given else PALE, font=font)
    return row
