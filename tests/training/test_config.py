from dataclasses import dataclass
from pathlib import Path

import pytest

from sora_fast.training.config import read_config, write_config


@dataclass(frozen=True)
class _Inner:
    t: tuple[int | None, int | None] = (None, 0)


@dataclass(frozen=True)
class _Outer:
    name: str
    size: tuple[int, int, int] = (1, 2, 2)
    share: float = 0.1
    mask: _Inner | None = None
    layers: tuple[_Inner, ...] = ()
    steps: int | None = None


def test_round_trip(tmp_path: Path) -> None:
    config = _Outer("ä", (2, 4, 4), 0.1 + 0.2, _Inner((None, 3)), (_Inner(), _Inner((1, 2))))
    write_config(tmp_path / "config.json", config)
    assert read_config(tmp_path / "config.json", _Outer) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a valid _Outer"), ('{"name": "a", "speed": 1}', "unknown field speed"), ("{}", "name")],
)
def test_errors_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path / "config.json", _Outer)
    assert str(tmp_path / "config.json") in str(error.value)
