"""What a command's arguments may be: for `type=` of argparse, which names the argument that is wrong."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def filled(text: str) -> str:
    """A name, as it is. An empty one comes of a shell's variable that is not set, and would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no file or folder; the current folder is .")
    return text


def path(text: str) -> Path:
    """A file or folder; not an empty name."""
    return Path(filled(text))


def number(kind: type, rule: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """`kind` is int or float; `rule` says in words what `fits` decides."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {rule}")
        return value

    return parse
