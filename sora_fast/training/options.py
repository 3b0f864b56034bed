"""What `sora-fast train` can be asked for, and what it does where nothing is said. Imports nothing heavy."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainOptions:
    """The options of the command line, by their names; see `sora-fast train --help`.

    None: what the device or the files suggest; see recipe.py and beginning.py.
    out: the run's folder. given: the names of those that were given, `out` aside.
    """

    out: Path
    data: str | None = None
    resume: bool = False
    replay: bool = False
    device: str | None = None
    minutes: float | None = None
    steps: int | None = None
    max_frames: int = 16
    max_side: int = 64
    fps: float | None = None
    clips: str = "anywhere"
    grey: bool = False
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    patch: tuple[int, int, int] | None = None
    text_encoder: str | None = None
    codec: str | None = None
    capacity: int | None = None
    optimizer: str = "muon"
    lr: float | None = None
    ema_decay: float | None = None
    caption_dropout: float = 0.1
    drop: str | None = None
    save_every: int = 500
    seed: int = 0
    precision: str = "auto"
    accumulate: int = 1
    recompute: str | None = None
    compile: str = "auto"
    no_compile: bool = False
    graph: bool = False
    workers: int | None = None
    sample_every: int | None = None
    json: bool = False
    tensorboard: bool = False
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class DistillOptions:
    """Likewise, of `sora-fast distill`. run: the teacher's folder; out: None: beside it. lr: None: half the run's."""

    run: Path
    out: Path | None = None
    data: str | None = None
    text_encoder: str | None = None
    resume: bool = False
    device: str | None = None
    steps: int = 4
    minutes: float = 10.0
    guidance: float = 3.0
    guidance_given: float | None = None
    lr: float | None = None
    seed: int = 0
    no_compile: bool = False
    json: bool = False
    tensorboard: bool = False
    given: frozenset[str] = frozenset()

    @property
    def folder(self) -> Path:
        """Of the new run."""
        return self.out or self.run.with_name(f"{self.run.name}-distilled")


@dataclass(frozen=True)
class VAEOptions:
    """Likewise, of `sora-fast train-vae`. strides: pixels (T, H, W) a latent; crop: the longest side of a part."""

    out: Path
    data: str | None = None
    resume: bool = False
    device: str | None = None
    minutes: float | None = None
    steps: int | None = None
    max_frames: int = 17
    max_side: int = 256
    crop: int = 64
    fps: float | None = None
    clips: str = "anywhere"
    grey: bool = False
    workers: int | None = None
    strides: tuple[int, int, int] = (4, 4, 4)
    channels: int = 4
    kl: float = 1e-5
    absolute: float = 0.0
    capacity: int | None = None
    lr: float | None = None
    ema_decay: float = 0.995
    save_every: int = 500
    seed: int = 0
    precision: str = "float32"
    json: bool = False
    tensorboard: bool = False
    given: frozenset[str] = frozenset()


VAE_CHANGEABLE = ("lr", "minutes", "steps", "save_every", "workers", "data", "json", "tensorboard")

# What can be said of a run that goes on, and of a distillation.
DISTILL_CHANGEABLE = ("minutes", "no_compile", "data", "text_encoder", "json", "tensorboard")
_TRAINING = ("lr", "minutes", "steps", "save_every", "recompute", "compile", "no_compile", "graph")
_TELLING = ("sample_every", "json", "tensorboard")
CHANGEABLE = (*_TRAINING, "workers", "data", "text_encoder", "codec", *_TELLING)


def spelled(names: Iterable[str]) -> str:
    """As they are typed: --a, --b."""
    return ", ".join("--" + name.replace("_", "-") for name in names)
