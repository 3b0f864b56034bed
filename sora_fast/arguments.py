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


def sizes(example: str) -> Callable[[str], tuple[int, ...]]:
    """Positive whole numbers with an x between, as many as in the example: "64x48" gives (64, 48)."""
    count = len(example.split("x"))

    def parse(text: str) -> tuple[int, ...]:
        try:
            numbers = tuple(int(part) for part in text.lower().split("x"))
        except ValueError:
            numbers = ()
        if len(numbers) != count or min(numbers) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {count} positive whole numbers with an x between, like {example}"
            )
        return numbers

    return parse


def interval(text: str) -> tuple[float, float]:
    """Two numbers from 0 to 1, the lower one first, with a colon between: "0.2:0.8"."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        low = high = math.nan
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not two numbers from 0 to 1, the lower one first, with a colon between, like 0.2:0.8"
        )
    return low, high


COUNT = number(int, "a whole number of at least 1", lambda value: value >= 1)
WHOLE = number(int, "a whole number of at least 0", lambda value: value >= 0)
SEED = number(int, "a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
POSITIVE = number(float, "a positive number", lambda value: 0 < value < math.inf)
FINITE = number(float, "a finite number", math.isfinite)
SHARE = number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
DECAY = number(float, "a number of at least 0 and less than 1", lambda value: 0 <= value < 1)
