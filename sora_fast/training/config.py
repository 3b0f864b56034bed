"""Configurations: frozen dataclasses that live as JSON in a run's folder."""

import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sora_fast import files

Config = TypeVar("Config")


def write_config(path: Path, config: Any) -> None:
    """Write a dataclass as indented JSON, in place of what is there."""
    files.write_text(path, json.dumps(asdict(config), indent=2, ensure_ascii=False) + "\n")


def read_config(path: Path, cls: type[Config]) -> Config:
    """Read what `write_config` wrote. ValueError names the file and the field that does not fit."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it does not hold a JSON object")
        return _build(cls, values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a valid {cls.__name__}: {error}") from error


def _build(hint: Any, value: Any) -> Any:
    """`value`, as JSON gives it, in the type that `hint` announces: dataclasses and tuples come back."""
    if is_dataclass(hint) and isinstance(value, dict):
        hints = get_type_hints(hint)
        known = {field.name for field in fields(hint)}
        if unknown := sorted(value.keys() - known):
            raise ValueError(f"unknown field {', '.join(unknown)}")
        return hint(**{name: _build(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    if isinstance(value, list):
        return tuple(_build(item_hint, item) for item_hint, item in _pair(hint, value))
    if isinstance(value, dict) and get_origin(hint) in (Union, UnionType):
        options = [option for option in get_args(hint) if is_dataclass(option)]
        fitting = [option for option in options if value.keys() <= {field.name for field in fields(option)}]
        return _build((fitting or options)[0], value) if options else value
    return value


def _pair(hint: Any, values: list[Any]) -> list[tuple[Any, Any]]:
    """Each item of a list with the type that a tuple hint gives it."""
    if get_origin(hint) in (Union, UnionType):
        hint = next((option for option in get_args(hint) if get_origin(option) is tuple), Any)
    items = [item for item in get_args(hint) if item is not Ellipsis] or [Any]
    return [(items[min(i, len(items) - 1)], value) for i, value in enumerate(values)]
