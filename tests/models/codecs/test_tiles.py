import pytest
import torch

from sora_fast.models.codecs.tiles import put_together, tiles_of


@pytest.mark.parametrize(("height", "width"), [(5, 7), (8, 8), (17, 9)])
def test_tiles_meet_and_see_what_is_around(height: int, width: int) -> None:
    frame = torch.arange(height * width * 1.0).view(1, 1, height, width)
    tiles = tiles_of(height, width, 8, 2)
    assert len(tiles) == -(-height // 8) * -(-width // 8)
    parts = []
    for tile in tiles:
        seen = frame[:, :, tile.seen_rows, tile.seen_columns].repeat_interleave(2, 2).repeat_interleave(2, 3)
        parts.append((tile, tile.inner(seen, 2)))
    assert torch.equal(put_together(parts, height, width, 2), frame.repeat_interleave(2, 2).repeat_interleave(2, 3))
    last = tiles[-1]
    assert last.seen_rows.start == max(0, last.rows.start - 2) and last.seen_columns.stop == width
