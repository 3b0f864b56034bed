import pytest
import torch

from sora_fast.nn.positions import FactorisedTables, FractionalPosition, SinCosPosition, SpacetimeSinCosPosition
from sora_fast.packing import PackedLayout


def test_sin_cos_encodes_the_column_first_then_the_row() -> None:
    layout = PackedLayout.from_grids([(1, 3, 5)])
    position = SinCosPosition(16)(layout)
    for token in range(15):
        row, column = divmod(token, 5)
        omega = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
        expected = torch.cat([f(place * omega) for place in (column, row) for f in (torch.sin, torch.cos)])
        made = position.h[row] + position.w[column]
        torch.testing.assert_close(made, expected.float())


def test_spacetime_sin_cos_has_channels_for_every_axis() -> None:
    position = SpacetimeSinCosPosition(32, theta=100.0)(PackedLayout.from_grids([(2, 3, 5)]))
    for place in ((0, 0, 0), (1, 2, 4), (300, 7, 0)):
        expected = []
        for coordinate, size in zip(place, (8, 12, 12), strict=True):
            omega = 100.0 ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
            expected += [torch.sin(coordinate * omega), torch.cos(coordinate * omega)]
        made = sum(table[coordinate] for table, coordinate in zip(position.tables, place, strict=True))
        torch.testing.assert_close(made, torch.cat(expected).float())
    with pytest.raises(ValueError, match="dim: 24; it must be a multiple of 16"):
        SpacetimeSinCosPosition(24)


def test_fractional_positions_depend_on_the_share_of_the_side_only() -> None:
    torch.manual_seed(0)
    module = FractionalPosition(16)
    small, large = PackedLayout.from_grids([(1, 2, 4)]), PackedLayout.from_grids([(3, 6, 12)])
    # The centre of a patch of the small grid is the centre of a patch of the one three times as large.
    t, h, w = (3 * small.coords + 1).long().unbind(1)
    torch.testing.assert_close(module(small), module(large)[(t * 6 + h) * 12 + w])


def test_factorised_tables_learn() -> None:
    tables = FactorisedTables(8, rows=(2, 3, 4))(PackedLayout.from_grids([(1, 1, 1)]))
    assert [tuple(table.shape) for table in tables.tables] == [(2, 8), (3, 8), (4, 8)]
    assert all(table.requires_grad for table in tables.tables)
