"""Large frames in parts: tiles of latent pixels, and around each what reaches it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """rows, columns: of the latents, that are this tile's. seen_rows, seen_columns: that are computed with."""

    rows: slice
    columns: slice
    seen_rows: slice
    seen_columns: slice

    def inner(self, seen: Tensor, scale: int) -> Tensor:
        """Of a result [F, C, h, w] for what is seen, `scale` pixels a latent pixel, the tile's own."""
        rows, columns = _within(self.rows, self.seen_rows, scale), _within(self.columns, self.seen_columns, scale)
        return seen[:, :, rows, columns]


def tiles_of(height: int, width: int, side: int, reach: int) -> list[Tile]:
    """Tiles of at most side × side latent pixels, each seen with `reach` more all around, where the frame has them."""
    cuts = [[(cut, _wider(cut, reach, size)) for cut in _cuts(size, side)] for size in (height, width)]
    return [
        Tile(rows, columns, seen_rows, seen_columns) for (rows, seen_rows), (columns, seen_columns) in product(*cuts)
    ]


def put_together(parts: Sequence[tuple[Tile, Tensor]], height: int, width: int, scale: int) -> Tensor:
    """What tiles gave, [F, C, h, w] each, as one frame."""
    if len(parts) == 1:
        return parts[0][1]
    frames, channels = parts[0][1].shape[:2]
    whole = parts[0][1].new_empty(frames, channels, height * scale, width * scale)
    for tile, part in parts:
        whole[:, :, _scaled(tile.rows, scale), _scaled(tile.columns, scale)] = part
    return whole


def _cuts(size: int, side: int) -> list[slice]:
    return [slice(start, min(start + side, size)) for start in range(0, size, side)]


def _wider(cut: slice, reach: int, size: int) -> slice:
    return slice(max(0, cut.start - reach), min(size, cut.stop + reach))


def _within(cut: slice, seen: slice, scale: int) -> slice:
    return _scaled(slice(cut.start - seen.start, cut.stop - seen.start), scale)


def _scaled(cut: slice, scale: int) -> slice:
    return slice(cut.start * scale, cut.stop * scale)
