"""From what was asked for to a request, and from its result to a file."""

import logging
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sora_fast import media
from sora_fast.generation.made import Made
from sora_fast.generation.options import SampleOptions
from sora_fast.generation.tasks import Request
from sora_fast.media import Clip, UnwritableMedia
from sora_fast.training.data.rates import same_rate
from sora_fast.training.run import RunConfig

log = logging.getLogger(__name__)

# Of `sora-fast sample`, where nothing is said. With 3, which leads past what clips look like, three real ones came back
# from their captions at 18 dB (PSNR; python -m benchmarks.own_clips).
GUIDANCE = 2.0


def requested(o: SampleOptions, config: RunConfig) -> tuple[Request, float]:
    """What is asked for, and the frames per second of the result. ValueError if sizes disagree."""
    given = {
        option: _given(file, config) for option, file in (("--image", o.image), ("--end", o.end)) if file is not None
    }
    sizes = {tuple(clip.video.shape[2:]) for clip in given.values()} | ({o.size} if o.size else set())
    if len(sizes) > 1:
        listed = " and ".join("x".join(map(str, size)) for size in sorted(sizes))
        raise ValueError(f"--size, --image and --end must agree, but they are {listed} pixels")
    height, width = sizes.pop() if sizes else (64, 64)
    head, tail = (given[option].video if option in given else None for option in ("--image", "--end"))
    guidance = o.guidance
    if guidance is None:
        guidance = GUIDANCE if config.distilled is None else 1.0
    options = {"guidance": guidance, "guidance_interval": o.guidance_interval, "seed": o.seed}
    request = Request(o.prompt, o.frames, height, width, head, tail, **options)
    return request, _rate(o.fps, given, config)


def check_result(o: SampleOptions, request: Request, channels: int, fps: float) -> float:
    """Before the work, not after it: frames per second that will be played. ValueError if it cannot be written."""
    sizes = {"frames": request.frames, "height": request.height, "width": request.width, "channels": channels}
    try:
        return media.check_output(o.out, **sizes, fps=fps, scale=o.scale)
    except UnwritableMedia as error:
        raise ValueError(f"--out {error}") from error


def write_result(o: SampleOptions, made: Made, fps: float) -> None:
    """Frames as they come; or keep all elsewhere, and say so in a ValueError: a disk can fill up during the work."""
    try:
        media.write_frames(o.out, made.pieces(), frames=made.size[0], fps=fps, scale=o.scale)
    except (ValueError, MemoryError) as error:
        try:
            kept = media.keep_unwritten(made.video(), [o.run, Path(tempfile.gettempdir())])
        except OSError as lost:
            raise ValueError(f"--out {error}; {lost}") from error
        code = (
            "import numpy, torch; from sora_fast.media import write_media; "
            f"write_media({o.out.name!r}, torch.from_numpy(numpy.load({str(kept)!r})), fps={fps}, scale={o.scale})"
        )
        raise ValueError(f"--out {error}; kept in {kept}. To write it here: python -c {shlex.quote(code)}") from error


def _given(file: Path, config: RunConfig) -> Clip:
    """An image or clip at the size that the model was trained at."""
    limits = {} if config.data is None else {"max_side": config.data.max_side, "fps": config.data.fps}
    return media.read_clip(file, channels=config.video_channels, **limits)


def _rate(asked: float | None, given: Mapping[str, Clip], config: RunConfig) -> float:
    """Frames per second of the result: as asked for, else of what is given, else of the run."""
    rates = {option: clip.fps for option, clip in given.items() if clip.fps is not None}
    result = asked or next(iter(rates.values()), config.fps)
    if rates and config.data_fps is not None:
        rates["the run's videos"] = config.data_fps
    if any(not same_rate(rate, other) for rate in rates.values() for other in rates.values()):
        listed = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        log.warning("not the same frames per second: %s; the result has %g", listed, result)
    return result
