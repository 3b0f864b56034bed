"""Captions: which text file belongs to which video or image, and what it says.

clip.mp4 has its caption in clip.mp4.txt, clip.mp4.json, clip.txt or clip.json ({"caption": …}), suffixes in capitals or
not: the first of them that is there.
"""

import codecs
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".txt", ".json")

# The mark of UTF-16 begins that of UTF-32, which therefore comes first.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class CaptionError(ValueError):
    """A caption file that cannot be read."""


@dataclass(frozen=True)
class Matches:
    """files: each medium's caption file, if it has one.

    unused: caption files of media that have a better one, which is named. orphans: those of no medium.
    """

    files: dict[Path, Path]
    unused: dict[Path, Path]
    orphans: list[Path]


def is_caption(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def match(media: Sequence[Path], captions: Sequence[Path]) -> Matches:
    """Which caption file is whose. Of several the one with the medium's full name goes first, then .txt before .json.

    One without the medium's suffix belongs to all media of its name: clip.txt to clip.mp4 and to clip.png.
    """
    named: dict[Path, list[Path]] = defaultdict(list)
    for caption in sorted(captions, key=_rank):
        named[caption.with_suffix("")].append(caption)
    files, behind = {}, {}
    for medium in media:
        for name in dict.fromkeys((medium, medium.with_suffix(""))):
            for caption in named.get(name, ()):
                behind[caption] = files.setdefault(medium, caption)
    used = set(files.values())
    unused = {caption: better for caption, better in behind.items() if caption not in used}
    return Matches(files, unused, [caption for caption in captions if caption not in behind])


def _rank(caption: Path) -> tuple[int, bool, Path]:
    suffix = caption.suffix.lower()
    return SUFFIXES.index(suffix), caption.suffix != suffix, caption


def read_caption(path: Path) -> str:
    """What a caption file says, in one line; UTF-8, or whatever a byte-order mark announces.

    Raises CaptionError, or OSError.
    """
    try:
        text = _decode(path.read_bytes())
        caption = json.loads(text)["caption"] if path.suffix.lower() == ".json" else text
    except (KeyError, TypeError) as error:
        raise CaptionError(f'its caption file {path.name} has no "caption"') from error
    except (ValueError, RecursionError) as error:
        raise CaptionError(f"its caption file {path.name} cannot be read: {error}") from error
    if not isinstance(caption, str):
        raise CaptionError(f'"caption" in {path.name} is {caption!r}, not a text')
    if "\0" in caption or any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise CaptionError(f"its caption file {path.name} is no text; save it as UTF-8")
    return " ".join(caption.split())


def _decode(content: bytes) -> str:
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    # Files joined to one file keep their marks, in the middle of it.
    return content.decode(encoding).replace("\ufeff", "")
