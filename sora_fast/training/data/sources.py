"""Where training samples come from.

A *source* is anything with `__getitem__(index) -> Sample`, deterministic in `index`. With `__len__` it is a
data set, gone through in a new random order every epoch; without, it is an endless stream: any index ≥ 0 will do.
With a text `fingerprint` that changes whenever its samples do, a run refuses to go on with other data.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sora_fast.training.data.captions import CaptionError, Matches, is_caption, match, read_caption
from sora_fast.training.data.rates import common_rates
from sora_fast.training.data.scenes import CutsError, is_cuts, match_cuts, read_cuts, scenes
from sora_fast.training.data.walk import each_once, walk
from sora_fast.training.distributed import World

if TYPE_CHECKING:
    from sora_fast.media import Clip, Probe, Timeline

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sample:
    """One video or image (T = 1) with its caption.

    video: (C, T, H, W), float, values in [-1, 1].
    note: what the user should hear of it, once.
    """

    video: Tensor
    caption: str = ""
    note: str = ""


class UnusableSample(ValueError):
    """A sample that cannot be used after all; the message says why. Training goes on without it."""


class Source(Protocol):
    """Anything that gives samples by number, always the same one for the same number."""

    def __getitem__(self, index: int) -> Sample: ...


def sample_name(source: Source, index: int) -> str:
    """What a sample is called in messages, and what is left out if it proves unusable: its file, if there is one."""
    return source.name(index) if hasattr(source, "name") else f"sample {index}"


@dataclass(frozen=True)
class DataConfig:
    """Which files are read, and how much of each.

    folder: searched with all its subfolders and what links lead to; names that begin with a dot are left out.
    max_frames: of a clip; None: all of the video.
    clips: "first": a video gives its first frames, and every file is decoded once at the start, as runs did before
        there was a choice. "anywhere": a clip begins at random, a long video gives several an epoch, in proportion to
        its length, none goes over a scene cut (see scenes.py), and the start probes the files (see index.py).
    max_side: frames with a longer side are scaled down to it, keeping their aspect ratio.
    fps: frames per second at which videos are sampled; None takes every frame.
    channels: 3 for RGB, 1 for grey.
    cache_bytes: decoded frames are kept in memory up to this much (2 GiB: a small data set is then decoded
        only once, by several workers once by each that needs it, and no ordinary machine runs out of memory).
    """

    folder: str
    max_frames: int | None = 64
    max_side: int | None = 256
    fps: float | None = None
    channels: int = 3
    cache_bytes: int = 2 << 30
    clips: str = "first"

    def __post_init__(self) -> None:
        if self.clips not in ("first", "anywhere"):
            raise ValueError(f'clips: {self.clips!r}; it must be "first" or "anywhere"')


class Entry(NamedTuple):
    """What is known of a file: its caption, (C, T, H, W) of all that `DataConfig` takes of it, frames per second.

    timeline: of a file that was probed. cuts: seconds at which its scenes begin.
    """

    caption: str
    shape: tuple[int, int, int, int]
    rate: float | None
    timeline: "Timeline | None" = None
    cuts: tuple[float, ...] = ()


class Span(NamedTuple):
    """Where a clip may lie: of a file, the frames first … last, of which it takes `length`, side by side."""

    file: int
    first: int
    last: int
    length: int

    @property
    def is_whole(self) -> bool:
        """Whether there is but one such clip."""
        return self.last - self.first == self.length


@dataclass(eq=False)
class FolderSource:
    """The videos and images of a folder, each once, with the captions beside them (see captions.py).

    A sample is a clip of a file, anywhere in its span (see `DataConfig.clips`). What cannot be used is named in the
    log, and kept in `skipped` with the reason; caption files that belong to nothing are named too. Raises ValueError
    if the folder is missing or nothing in it is usable.
    files, entries: one each. spans: one a sample; every file has at least one.
    world: the workers that share out the files; each keeps the frames that it decoded in its own memory.
    """

    config: DataConfig
    progress: bool = False
    world: World = field(default_factory=World)
    files: list[Path] = field(default_factory=list, init=False)
    entries: list[Entry] = field(default_factory=list, init=False)
    spans: list[Span] = field(default_factory=list, init=False)
    skipped: dict[Path, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._cache: dict[tuple[Path, int], Tensor] = {}
        self._cached_bytes = 0
        folder = Path(self.config.folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        found = walk(folder)
        beside = _Beside.of(found.files, cuts=self.config.clips == "anywhere")
        self.skipped |= found.skipped | beside.doubles
        for path, entry in zip(beside.media, self._entries(beside), strict=True):
            self._note(path, entry)
        _warn_of_unused(beside)
        for path, reason in self.skipped.items():
            log.warning("skipped %s: %s", path, reason)
        if not self.files:
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in list(self.skipped.items())[:3])
            raise ValueError(f"{folder} holds no usable video or image{f' ({reasons})' if reasons else ''}")

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Sample:
        """The first of the clips that a sample may be."""
        return self._clip(self.spans[index], self.spans[index].first)

    def draw(self, index: int, random: np.random.Generator) -> Sample:
        """One of the clips that a sample may be."""
        span = self.spans[index]
        return self._clip(span, span.first + int(random.integers(span.last - span.first - span.length + 1)))

    def name(self, index: int) -> str:
        """The file of a sample, below the folder, which may be moved."""
        return self.files[self.spans[index].file].relative_to(self.config.folder).as_posix()

    def divided(self, parts: int) -> "FolderSource":
        """The same, without what it has in its memory, for one of several processes that share out the memory."""
        other = copy(self)
        other.config = replace(self.config, cache_bytes=self.config.cache_bytes // parts)
        other.world, other._cache, other._cached_bytes = World(), {}, 0
        return other

    @property
    def captions(self) -> list[str]:
        """Of the files."""
        return [entry.caption for entry in self.entries]

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """(C, T, H, W) of the files' clips, the longest of each."""
        longest = [0] * len(self.files)
        for span in self.spans:
            longest[span.file] = max(longest[span.file], span.length)
        return [(entry.shape[0], length, *entry.shape[2:]) for entry, length in zip(self.entries, longest, strict=True)]

    @property
    def rates(self) -> list[float | None]:
        """Frames per second of the files; None for a still, and for a file that does not say."""
        return [entry.rate for entry in self.entries]

    @property
    def summary(self) -> str:
        """How many files there are, with and without a caption, and how many were skipped, in one line."""
        captioned = sum(map(bool, self.captions))
        clips = f", {len(self)} clips an epoch" if len(self) > len(self.files) else ""
        return (
            f"{len(self.files)} files to train on, {captioned} with a caption and {len(self.files) - captioned} "
            f"without{clips}; {len(self.skipped)} skipped"
        )

    @property
    def fingerprint(self) -> str:
        """How many files, and a hash of their names below the folder, shapes, captions and, if they matter, spans."""
        names = [path.relative_to(self.config.folder).as_posix() for path in self.files]
        content = json.dumps(list(zip(names, (entry.shape for entry in self.entries), self.captions, strict=True)))
        if self.config.clips == "anywhere":
            content += json.dumps(self.spans)
        return f"{len(self.files)} files, {hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def shape(self, index: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a sample, without reading it."""
        span = self.spans[index]
        channels, _, height, width = self.entries[span.file].shape
        return channels, span.length, height, width

    @property
    def rate(self) -> float | None:
        """Frames per second of the videos, the commonest if they differ; None if there are only stills."""
        return next(iter(self._common_rates()), None)

    @property
    def rate_summary(self) -> str:
        """The rates of the videos, in half a sentence; "" if there are only stills."""
        counts = self._common_rates()
        if len(counts) > 1:
            listed = _listed([f"{count} at {rate:g}" for rate, count in counts.items()])
            return f"the videos run at different rates, {listed} frames per second"
        return f"the videos run at {self.rate:g} frames per second" if counts else ""

    def _common_rates(self) -> dict[float, int]:
        return common_rates([rate for rate in self.rates if rate is not None])

    def _clip(self, span: Span, first: int) -> Sample:
        entry, key = self.entries[span.file], (self.files[span.file], first)
        if key in self._cache:
            return Sample(self._cache[key].float().div(127.5).sub(1), entry.caption)
        video, note = self._decoded(span, first)
        if span.is_whole:  # of others it would hardly be asked for again
            self._keep(key, video)
        return Sample(video, entry.caption, note)

    def _decoded(self, span: Span, first: int) -> tuple[Tensor, str]:
        """A clip, and what of it is not as the file's header says. UnusableSample if it cannot be had."""
        from sora_fast.media import UnreadableMedia

        entry = self.entries[span.file]
        try:
            video = self._read(self.files[span.file], span.length, first, entry.timeline).video
        except UnreadableMedia as error:
            raise UnusableSample(error.reason) from error
        except OSError as error:
            raise UnusableSample(str(error)) from error
        expected = (entry.shape[0], span.length, *entry.shape[2:])
        if video.shape == expected:
            return video, ""
        came = f"it has {_in_words(video.shape)} where its header says {_in_words(expected)}"
        if video.shape[2:] != expected[2:]:
            raise UnusableSample(came)
        return video, f"{came}; used as it is"

    def _read(self, path: Path, frames: int | None, first: int, timeline: "Timeline | None") -> "Clip":
        from sora_fast import media  # needs PyAV, which only those who read files have to have

        c = self.config
        options = {"fps": c.fps, "max_side": c.max_side, "channels": c.channels}
        return media.read_clip(path, max_frames=frames, start=first, timeline=timeline, **options)

    def _entries(self, beside: "_Beside") -> list[Entry | str]:
        """What is to be known of each file, or why it cannot be used."""
        mine = list(self.world.shared_out(beside.media))
        bar = partial(tqdm, desc="reading", unit=" files", disable=not self.progress, total=len(mine))
        if self.config.clips == "first":
            found = map(self._decoded_entry, bar(mine))
        else:
            from sora_fast.training.data.index import probed

            found = map(self._probed_entry, probed(Path(self.config.folder), mine, tell=bar))
        read = [_with_texts(path, entry, beside) for path, entry in zip(mine, found, strict=True)]
        return self.world.joint(read)

    def _decoded_entry(self, path: Path) -> Entry | str:
        from sora_fast.media import UnreadableMedia

        try:
            clip = self._read(path, self.config.max_frames, 0, None)
        except UnreadableMedia as error:
            return error.reason
        except OSError as error:
            return str(error)
        self._keep((path, 0), clip.video)
        return Entry("", tuple(clip.video.shape), clip.fps)

    def _probed_entry(self, found: "Probe | str") -> Entry | str:
        from sora_fast.media import scaled

        if isinstance(found, str):
            return found
        c, timeline = self.config, found.timeline
        size = scaled(found.height, found.width, c.max_side)
        rate = timeline.mean_rate if c.fps is None or timeline.is_still else c.fps
        return Entry("", (c.channels, timeline.ticks(c.fps), *size), rate, timeline)

    def _keep(self, key: tuple[Path, int], video: Tensor) -> None:
        if self._cached_bytes + video.numel() <= self.config.cache_bytes:
            self._cached_bytes += video.numel()
            self._cache[key] = video.add(1).mul(127.5).round().to(torch.uint8)

    def _note(self, path: Path, entry: Entry | str) -> None:
        if isinstance(entry, str):
            self.skipped[path] = entry
            return
        self.spans += _spans(len(self.files), entry, self.config)
        self.files.append(path)
        self.entries.append(entry)


@dataclass(frozen=True)
class _Beside:
    """The media of a folder, and which files belong to them.

    doubles: links to media that are there already. strays: lists of cuts that are not used.
    """

    media: list[Path]
    doubles: dict[Path, str]
    captions: Matches
    cuts: dict[Path, Path]
    strays: list[Path]

    @staticmethod
    def of(files: Sequence[Path], *, cuts: bool) -> "_Beside":
        """cuts: whether lists of scene cuts are looked for; else they are taken for what they are not, media."""
        captions = [path for path in files if is_caption(path)]
        others = [path for path in files if not is_caption(path)]
        lists = [path for path in others if cuts and is_cuts(path)]
        media, doubles = each_once([path for path in others if path not in set(lists)])
        cut = match_cuts(media, lists)
        strays = [path for path in lists if path not in set(cut.values())]
        return _Beside(media, doubles, match(media, captions), cut, strays)


def _with_texts(path: Path, entry: Entry | str, beside: _Beside) -> Entry | str:
    """With what stands beside the file; or why that cannot be used."""
    if isinstance(entry, str):
        return entry
    caption, cuts = beside.captions.files.get(path), beside.cuts.get(path)
    try:
        return entry._replace(
            caption="" if caption is None else read_caption(caption),
            cuts=() if cuts is None else tuple(read_cuts(cuts)),
        )
    except (OSError, CaptionError, CutsError) as error:
        return str(error)


def _spans(file: int, entry: Entry, config: DataConfig) -> Iterator[Span]:
    """As many clips of each scene as fit into it side by side, but at least one."""
    total = entry.shape[1]
    if config.clips == "first":
        yield Span(file, 0, total, total)
        return
    for first, last in scenes(entry.timeline, entry.cuts, config.fps):
        length = min(last - first, config.max_frames or last - first)
        yield from [Span(file, first, last, length)] * ((last - first) // length)


def _in_words(shape: Sequence[int]) -> str:
    _, frames, height, width = shape
    return f"{frames} frames of {height}x{width}"


def _warn_of_unused(beside: _Beside) -> None:
    matches = beside.captions
    if beside.strays:
        log.warning("lists of scene cuts that belong to no file: %s", _listed(list(map(str, beside.strays))))
    if matches.orphans:
        log.warning("caption files that belong to no video or image: %s", _listed(list(map(str, matches.orphans))))
    if matches.unused:
        pairs = [f"{file} ({better.name} is read)" for file, better in matches.unused.items()]
        log.warning("caption files that are not used, since another one goes first: %s", _listed(pairs))


def _listed(items: Sequence[str], most: int = 5) -> str:
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
