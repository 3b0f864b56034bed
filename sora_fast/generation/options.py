"""What `sora-fast sample` can be asked for. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SampleOptions:
    """The options of the command line, by their names; see `sora-fast sample --help`.

    guidance, steps: None: as suits the run.
    """

    run: Path
    out: Path
    prompt: str = ""
    frames: int = 16
    size: tuple[int, int] | None = None
    image: Path | None = None
    end: Path | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    steps: int | None = None
    sampler: str | None = None
    cache: float = 0.0
    compile: bool | None = None
    graph: bool | None = None
    seed: int = 0
    fps: float | None = None
    scale: int = 1
    text_encoder: str | None = None
    codec: str | None = None
    device: str | None = None
