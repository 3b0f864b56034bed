from dataclasses import replace

from sora_fast.report import Measurement, Result, Spread
from sora_fast.report.tables import everything

PACKED = Measurement("packing", "mixed", "", "packing", Spread(1, 1, 1, 9), notes={"padding": 0.25, "steps": 6})
OTHER = replace(PACKED, backend="padding", notes={"kept_bytes_per_token": 2048.0})


def test_notes_have_columns_in_their_units_where_any_has_them() -> None:
    table = everything([Result("file.json", {}, None, (PACKED, OTHER))], ["file"])
    assert table.columns[-3:] == ("× fastest", "% padding", "KiB kept a token")
    assert [row[-2:] for row in table.rows] == [(25, ""), ("", 2)]
