"""Where training samples come from.

A *source* is anything with `__getitem__(index) -> Sample`, deterministic in `index`. With `__len__` it is a
data set, gone through in a new random order every epoch; without, it is an endless stream: any index ≥ 0 will do.
With a text `fingerprint` that changes whenever its samples do, a run refuses to go on with other data.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from sora_fast.training.captions import CaptionError, Matches, is_caption, match, read_caption
from sora_fast.training.distributed import World
from sora_fast.training.rates import common_rates
from sora_fast.training.walk import each_once, walk

if TYPE_CHECKING:
    from sora_fast.media import Clip

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sample:
    """One video or image (T = 1) with its caption.

    video: (C, T, H, W), float, values in [-1, 1].
    """

    video: Tensor
    caption: str = ""


class Source(Protocol):
    """Anything that gives samples by number, always the same one for the same number."""

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class DataConfig:
    """Which files are read, and how much of each.

    folder: searched with all its subfolders and what links lead to; names that begin with a dot are left out.
    max_frames: frames taken from the start of a video; what follows is not used.
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


@dataclass(eq=False)
class FolderSource:
    """The videos and images of a folder, each once, with the captions beside them (see captions.py).

    Every file is decoded once at the start. What cannot be used is named in the log, and kept in `skipped` with the
    reason; caption files that belong to nothing are named too. Raises ValueError if the folder is missing or nothing
    in it is usable.
    rates: frames per second of each file; None for a still, and for a file that does not say.
    world: the workers that share out the decoding; each keeps the frames that it decoded in its own memory.
    """

    config: DataConfig
    progress: bool = False
    world: World = field(default_factory=World)
    files: list[Path] = field(default_factory=list, init=False)
    captions: list[str] = field(default_factory=list, init=False)
    shapes: list[tuple[int, int, int, int]] = field(default_factory=list, init=False)
    rates: list[float | None] = field(default_factory=list, init=False)
    skipped: dict[Path, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._cache: dict[Path, Tensor] = {}
        self._cached_bytes = 0
        folder = Path(self.config.folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        found = walk(folder)
        media, doubles = each_once([path for path in found.files if not is_caption(path)])
        self.skipped |= found.skipped | doubles
        matches = match(media, [path for path in found.files if is_caption(path)])
        mine = tqdm(self.world.shared_out(media), desc="reading", unit=" files", disable=not self.progress)
        entries = self.world.joint([self._take(path, matches.files.get(path)) for path in mine])
        for path, entry in zip(media, entries, strict=True):
            self._note(path, entry)
        _warn_of_unused(matches)
        for path, reason in self.skipped.items():
            log.warning("skipped %s: %s", path, reason)
        if not self.files:
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in list(self.skipped.items())[:3])
            raise ValueError(f"{folder} holds no usable video or image{f' ({reasons})' if reasons else ''}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path = self.files[index]
        if path in self._cache:
            video = self._cache[path].float().div(127.5).sub(1)
        else:
            video = self._read(path).video
            self._keep(path, video)
        return Sample(video, self.captions[index])

    @property
    def summary(self) -> str:
        """How many files there are, with and without a caption, and how many were skipped, in one line."""
        captioned = sum(bool(caption) for caption in self.captions)
        return (
            f"{len(self)} files to train on, {captioned} with a caption and {len(self) - captioned} without; "
            f"{len(self.skipped)} skipped"
        )

    @property
    def fingerprint(self) -> str:
        """How many files, and a hash of their names below the folder, shapes and captions."""
        names = [path.relative_to(self.config.folder).as_posix() for path in self.files]
        content = json.dumps(list(zip(names, self.shapes, self.captions, strict=True)))
        return f"{len(self)} files, {hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def shape(self, index: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a sample, without reading it."""
        return self.shapes[index]

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

    def _read(self, path: Path) -> "Clip":
        from sora_fast.media import read_clip  # needs PyAV, which only those who read files have to have

        c = self.config
        return read_clip(path, max_frames=c.max_frames, fps=c.fps, max_side=c.max_side, channels=c.channels)

    def _take(self, path: Path, caption_file: Path | None) -> "_Entry | str":
        """What is to be known of a file, or why it cannot be used."""
        from sora_fast.media import UnreadableMedia

        try:
            caption = "" if caption_file is None else read_caption(caption_file)
            clip = self._read(path)
        except UnreadableMedia as error:
            return error.reason
        except (OSError, CaptionError) as error:
            return str(error)
        self._keep(path, clip.video)
        return _Entry(caption, tuple(clip.video.shape), clip.fps)

    def _keep(self, path: Path, video: Tensor) -> None:
        if self._cached_bytes + video.numel() <= self.config.cache_bytes:
            self._cached_bytes += video.numel()
            self._cache[path] = video.add(1).mul(127.5).round().to(torch.uint8)

    def _note(self, path: Path, entry: "_Entry | str") -> None:
        if isinstance(entry, str):
            self.skipped[path] = entry
            return
        self.files.append(path)
        self.captions.append(entry.caption)
        self.shapes.append(entry.shape)
        self.rates.append(entry.rate)


class _Entry(NamedTuple):
    """caption, shape (C, T, H, W) and rate of a file."""

    caption: str
    shape: tuple[int, int, int, int]
    rate: float | None


def _warn_of_unused(matches: Matches) -> None:
    if matches.orphans:
        log.warning("caption files that belong to no video or image: %s", _listed(list(map(str, matches.orphans))))
    if matches.unused:
        pairs = [f"{file} ({better.name} is read)" for file, better in matches.unused.items()]
        log.warning("caption files that are not used, since another one goes first: %s", _listed(pairs))


def _listed(items: Sequence[str], most: int = 5) -> str:
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
