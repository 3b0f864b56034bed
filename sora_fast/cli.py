"""The command line: `sora-fast demo`, `train`, `sample`, `report` and `doctor`.

Heavy imports happen inside the commands, so that --help and --version answer at once.
"""

import argparse
import contextlib
import io
import logging
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sora_fast.arguments import filled as _filled
from sora_fast.arguments import number as _number
from sora_fast.arguments import path as _path
from sora_fast.files import check_folder

if TYPE_CHECKING:
    from torch import Tensor

    from sora_fast.generation.tasks import Request
    from sora_fast.media import Clip
    from sora_fast.proof import Report
    from sora_fast.training.batches import BatchConfig
    from sora_fast.training.data import FolderSource
    from sora_fast.training.distributed import World
    from sora_fast.training.run import RunConfig, TrainConfig

log = logging.getLogger(__name__)

WRONG, BAD_INPUT, INTERRUPTED = 1, 2, 130
# Static sizes of a batch that cost time even where they are not used: enough for small images, not for the worst case.
MOST_SEGMENTS, MOST_TEXT = 256, 8192
# What `train` is asked for where it is not said.
NEW_RUN = {
    "data": None,
    "resume": False,
    "device": None,
    "minutes": None,
    "steps": None,
    "max_frames": 16,
    "max_side": 64,
    "fps": None,
    "grey": False,
    "dim": 256,
    "depth": 6,
    "heads": 4,
    "patch": (1, 4, 4),
    "text_encoder": None,
    "capacity": 8192,
    "optimizer": "adamw",
    "lr": 1e-3,
    "ema_decay": 0.999,
    "caption_dropout": 0.1,
    "save_every": 500,
    "seed": 0,
    "bf16": False,
    "no_compile": False,
}
CHANGEABLE = ("lr", "minutes", "steps", "save_every", "no_compile", "data", "text_encoder")  # when a run goes on

TRAIN_HELP = """\
Train a video model on a folder of your own videos and images.

The folder may hold anything that FFmpeg and Pillow read, in subfolders and behind links too. A caption stands beside
its file: that of clip.mp4 in clip.txt or clip.mp4.txt, or in a .json as {"caption": "..."}. Files that cannot be used
are named and skipped.

  sora-fast train --data clips --out runs/first --minutes 30
  sora-fast sample runs/first --prompt "a red ball" --frames 16 --size 64x64 --out ball.mp4

Ctrl-C saves; the run goes on, here for longer, with:

  sora-fast train --resume --out runs/first --minutes 60
"""

SAMPLE_HELP = """\
Make a video (or, with --frames 1, an image) with a trained model.

  sora-fast sample runs/first --prompt "a red ball" --frames 16 --size 64x48 --out ball.mp4
  sora-fast sample runs/first --prompt "a red ball" --frames 16 --image start.png --out ball.mp4   from an image
  sora-fast sample runs/first --frames 24 --image clip.mp4 --out longer.mp4                       a clip, continued
  sora-fast sample runs/first --frames 24 --image a.mp4 --end b.mp4 --out joined.mp4              two clips, joined
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a kernel found wrong, 2 for bad input, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):  # escapes what the terminal cannot show, as standard error does
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if argv[:1] == ["demo"]:  # has its own options
            from sora_fast.demo.run import main as demo

            return demo(argv[1:])
        arguments = _parser().parse_args(argv)
        return arguments.command(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except ModuleNotFoundError as error:
        return _fail(f"{error}; pip install 'sora_fast[demo,text]' brings the optional parts")
    except OSError as error:
        known = error.filename is not None and error.strerror
        return _fail(f"{error.filename}: {error.strerror}" if known else str(error))
    except (ValueError, TypeError, FloatingPointError) as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        from sora_fast.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        advice = {"train": "a smaller --capacity or model", "sample": "a smaller --size or fewer --frames"}
        return _fail(f"out of memory ({str(error).strip()}); {advice.get(argv[0], 'less at once')} may fit")


def _fail(message: str) -> int:
    rank = int(os.environ.get("RANK", "0"))  # of several workers each may have its own
    print(f"sora-fast: error{f' of worker {rank}' if rank else ''}: {message}", file=sys.stderr)
    return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sora-fast", description="Train small, fast video diffusion transformers.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_parser("demo", help="train on moving digits, sample, measure: the whole thing in minutes")
    _add_train(commands)
    _add_sample(commands)
    _add_report(commands)
    _add_doctor(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"sora-fast {version('sora_fast')}")
        parser.exit()


def _add_train(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "train",
        help="train on a folder of videos and images",
        description=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # so that --resume knows what was asked for
    )
    parser.set_defaults(command=_train)
    defaults = argparse.Namespace(**NEW_RUN)
    add = parser.add_argument_group("what and where").add_argument
    add(
        "--data",
        metavar="FOLDER",
        type=_filled,
        help="videos, images and their captions; beside --resume: where they are now",
    )
    add("--out", metavar="RUN", required=True, type=_path, help="folder of the run: configuration, log, checkpoints")
    add(
        "--resume",
        action="store_true",
        help=f"go on with the run in --out as it was, except for {_options(CHANGEABLE)}",
    )
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add = parser.add_argument_group("how long, in all (one of the two)").add_argument
    add("--minutes", type=_POSITIVE, help="train for so long (default: 30)")
    add("--steps", type=_COUNT, help="train for so many steps; resuming then gives the same bits as never stopping")
    add = parser.add_argument_group("data").add_argument
    add("--max-frames", type=_COUNT, help=f"frames taken from the start of a video (default: {defaults.max_frames})")
    add("--max-side", type=_COUNT, help=f"longer sides are scaled down to this (default: {defaults.max_side} pixels)")
    add(
        "--fps",
        type=_POSITIVE,
        help="sample videos at this rate, which is then that of what is made (default: every frame, and the rate that "
        "most videos have)",
    )
    add("--grey", action="store_true", help="one grey channel in place of RGB")
    add = parser.add_argument_group("model").add_argument
    add("--dim", type=_COUNT, help=f"width (default: {defaults.dim})")
    add("--depth", type=_COUNT, help=f"transformer blocks (default: {defaults.depth})")
    add("--heads", type=_COUNT, help=f"attention heads (default: {defaults.heads})")
    add("--patch", type=_sizes("1x4x4"), metavar="TxHxW", help="pixels in a token (default: 1x4x4)")
    add(
        "--text-encoder",
        metavar="FOLDER",
        type=_filled,
        help="a CLIP or T5 saved there, which takes 77 or 226 tokens of a caption (default: a small one, trained "
        "along, which takes 255 bytes); beside --resume: where it is now",
    )
    add = parser.add_argument_group("training").add_argument
    add("--capacity", type=_COUNT, help=f"tokens in a batch (default: {defaults.capacity})")
    add("--optimizer", choices=("adamw", "muon"), help=f"default: {defaults.optimizer}")
    add("--lr", type=_POSITIVE, help=f"peak learning rate (default: {defaults.lr})")
    add("--ema-decay", type=_DECAY, help=f"of the averaged weights (default: {defaults.ema_decay})")
    add("--caption-dropout", type=_SHARE, help=f"share of captions left out (default: {defaults.caption_dropout})")
    add("--save-every", type=_COUNT, help=f"steps between checkpoints (default: {defaults.save_every})")
    add("--seed", type=_SEED, help=f"default: {defaults.seed}")
    add("--bf16", action="store_true", help="compute in bfloat16 (for GPUs)")
    add("--no-compile", action="store_true", help="without torch.compile: starts sooner, runs slower")


def _add_sample(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "sample",
        help="make a video with a trained model",
        description=SAMPLE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_sample)
    add = parser.add_argument
    add("run", metavar="RUN", type=_path, help="folder of a run: what `sora-fast train --out` made")
    add("--out", type=_path, required=True, help="file to write: .mp4, .gif, or .png for one frame")
    add(
        "--prompt",
        default="",
        help="what is to be seen; cut where it is longer than the run's text encoder takes: 255 bytes (the small one), "
        "77 tokens (CLIP) or 226 (T5)",
    )
    add("--frames", type=_COUNT, default=16, help="frames of the whole result (default: %(default)s)")
    add("--size", type=_sizes("64x48"), metavar="HxW", help="height x width in pixels (default: 64x64, or the image's)")
    add(
        "--image",
        type=_path,
        metavar="FILE",
        help="image or clip to begin with, scaled down as the run's own files were; its frames are kept",
    )
    add("--end", type=_path, metavar="FILE", help="image or clip to end with, of the same size")
    add("--guidance", type=_FINITE, default=3.0, help="1: none; more follows the prompt closer (default: %(default)s)")
    add("--steps", type=_COUNT, default=30, help="steps of the sampler (default: %(default)s)")
    add("--sampler", help="euler, heun, ddim, dpm++ or ddpm (default: what suits the run)")
    add("--seed", type=_SEED, default=0, help="another seed, another video (default: %(default)s)")
    add(
        "--fps", type=_POSITIVE, help="frames per second of the result (default: those of the given clip or of the run)"
    )
    add("--scale", type=_COUNT, default=1, help="enlarge every pixel so many times (default: %(default)s)")
    add(
        "--text-encoder",
        metavar="FOLDER",
        type=_filled,
        help="where the run's CLIP or T5 is, if it is not where it was",
    )
    add("--device", default=None, help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")


def _add_report(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "report",
        help="show the results of benchmarks on one page",
        description="Make one HTML page of benchmark results, and Markdown and PNGs beside it.",
    )
    parser.set_defaults(command=_report)
    add = parser.add_argument
    add(
        "results",
        metavar="RESULTS",
        nargs="+",
        type=_path,
        help="JSON of benchmarks.gpu_suite or pytest --benchmark-json; later files are compared with the first",
    )
    add("--out", type=_path, default=Path("report.html"), help="page to write (default: %(default)s)")
    add("--loops", type=_path, metavar="FILE", help="JSON of benchmarks.aot: also show the kernels' hot loops")


def _add_doctor(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "doctor",
        help="what runs here, and why; prove the kernels on this GPU",
        description="Show versions, devices, the backend that every op runs on by default, and why.",
    )
    parser.set_defaults(command=_doctor)
    add = parser.add_argument
    add("--prove", action="store_true", help="first hold the kernels to fp64 here, and record what is right")
    add("--minutes", type=_POSITIVE, default=2.0, help="that proving may take (default: %(default)g)")
    add("--ops", nargs="+", metavar="OP", help="prove these alone (default: all that have kernels)")
    add("--device", default=None, help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add("--json", action="store_true", help="print JSON")


def _options(names: Sequence[str]) -> str:
    """As they are typed: --a, --b."""
    return ", ".join("--" + name.replace("_", "-") for name in names)


_COUNT = _number(int, "a whole number of at least 1", lambda value: value >= 1)
_SEED = _number(int, "a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
_POSITIVE = _number(float, "a positive number", lambda value: 0 < value < math.inf)
_FINITE = _number(float, "a finite number", math.isfinite)
_SHARE = _number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
_DECAY = _number(float, "a number of at least 0 and less than 1", lambda value: 0 <= value < 1)


def _sizes(example: str) -> "argparse._ActionType":
    count = len(example.split("x"))

    def parse(text: str) -> tuple[int, ...]:
        try:
            sizes = tuple(int(part) for part in text.lower().split("x"))
        except ValueError:
            sizes = ()
        if len(sizes) != count or min(sizes) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {count} positive whole numbers with an x between, like {example}"
            )
        return sizes

    return parse


def _device(name: str | None) -> str:
    import torch

    from sora_fast.training.distributed import launched, local_rank

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launched():  # one each
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # PyTorch knows names of devices it was not built for
        raise ValueError(f"--device {name}: it must be cpu, cuda, or cuda with a number, like cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: there is no usable GPU here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
    return name


def _train(a: argparse.Namespace) -> int:
    from sora_fast.training.distributed import joined

    given = (vars(a).keys() & NEW_RUN.keys()) - {"resume", "device"}
    a = argparse.Namespace(**(NEW_RUN | vars(a)))
    if not a.resume and a.data is None:
        raise ValueError("train needs --data FOLDER, for a new run, or --resume")
    device = _device(a.device)
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(joined(device))
        if world.rank:  # the user hears it once
            stack.enter_context(contextlib.redirect_stdout(None))
            logging.getLogger().setLevel(logging.ERROR)
        return _train_together(a, given, device, world)


def _train_together(a: argparse.Namespace, given: Set[str], device: str, world: "World") -> int:
    """What each of the workers does."""
    from sora_fast.training.data import FolderSource
    from sora_fast.training.trainer import Trainer

    config = _resumed_config(a, given) if a.resume else _new_config(a)
    source = FolderSource(config.data, progress=world.rank == 0, world=world)
    print(source.summary)
    if not a.resume:
        config = _fitted(config, a, source)
    if source.rate_summary:
        print(f"{source.rate_summary}; what is made will run at {config.fps:g}")
    trainer = Trainer(config, source, a.out, device=device, resume=a.resume)
    if trainer.networks.text is not None:
        trainer.networks.text.check(source.captions)
    if a.resume:
        print(f"going on from step {trainer.step}")
    resume = f"sora-fast train --resume --out {a.out}"
    before = trainer.step
    try:
        finished = trainer.fit()
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}: {resume} --lr {config.train.lr / 3:.1g}") from error
    if not finished:
        print(f"Saved at step {trainer.step}. To go on: {resume}")
        return INTERRUPTED
    if a.resume and trainer.step == before:
        print(f"It was at its end already. To train it for longer: {resume} {_longer(config.train)}")
    print(f"Done: {trainer.step} steps. To sample: sora-fast sample {a.out} --prompt … --out clip.mp4")
    return 0


def _longer(config: "TrainConfig") -> str:
    """The option that doubles what a run was given."""
    return f"--minutes {2 * config.minutes:g}" if config.steps is None else f"--steps {2 * config.steps}"


def _resumed_config(a: argparse.Namespace, given: Set[str]) -> "RunConfig":
    """What the run was made with, changed as far as it can be."""
    from sora_fast.training.run import moved, read_run

    if fixed := sorted(given - set(CHANGEABLE)):
        raise ValueError(
            f"{_options(fixed)}: a run keeps what it was made with; beside --resume there can be {_options(CHANGEABLE)}"
        )
    config = read_run(a.out)
    if config.data is None:
        raise ValueError(f"{a.out} was not made by `sora-fast train`; it cannot be resumed by it")
    config = moved(config, data=a.data, text_encoder=a.text_encoder)
    if not Path(config.data.folder).is_dir():
        raise ValueError(f"{config.data.folder} is no folder; say where the run's data is now: --data FOLDER")
    changes = {name: getattr(a, name) for name in given & {"lr", "save_every"}}
    if given & {"steps", "minutes"}:  # either takes the place of what limited the run
        changes |= {"steps": a.steps, "minutes": a.minutes}
    if a.no_compile:
        changes["compile"] = None
    return replace(config, train=replace(config.train, **changes))


def _new_config(a: argparse.Namespace) -> "RunConfig":
    """All but what depends on the files."""
    from sora_fast.models import SoraDiTConfig
    from sora_fast.training.data import DataConfig
    from sora_fast.training.run import RunConfig, TextConfig, TrainConfig, check_new

    check_new(a.out)
    check_folder(a.out)
    if a.dim % (2 * a.heads):
        raise ValueError(f"--heads {a.heads}: it must divide --dim {a.dim} into parts of an even width")
    text, channels = TextConfig(folder=a.text_encoder), 1 if a.grey else 3
    return RunConfig(
        model=SoraDiTConfig(
            dim=a.dim,
            depth=a.depth,
            heads=a.heads,
            in_channels=channels,
            patch_size=a.patch,
            text_dim=text.width,
            pooled_dim=text.width,
        ),
        train=TrainConfig(
            steps=a.steps,
            minutes=30.0 if a.minutes is None and a.steps is None else a.minutes,
            optimizer=a.optimizer,
            lr=a.lr,
            ema_decay=a.ema_decay,
            precision="bfloat16" if a.bf16 else "float32",
            compile=None if a.no_compile else "inductor",
            seed=a.seed,
            save_every=a.save_every,
        ),
        text=text,
        data=DataConfig(a.data, a.max_frames, a.max_side, a.fps, channels),
        fps=a.fps or 8.0,
    )


def _fitted(config: "RunConfig", a: argparse.Namespace, source: "FolderSource") -> "RunConfig":
    """With what depends on the files: the sizes of a batch, and how fast videos are."""
    train = replace(config.train, batch=_batch_config(a, source))
    return replace(config, train=train, fps=source.rate or config.fps, data_fps=source.rate)


def _batch_config(a: argparse.Namespace, source: "FolderSource") -> "BatchConfig":
    """As many places in a batch, for samples and for text, as the files at hand can need."""
    import math

    from sora_fast.models.codecs import IdentityCodec
    from sora_fast.packing import token_grid
    from sora_fast.training.batches import BatchConfig

    spec = IdentityCodec.for_patches(source.config.channels, a.patch).spec
    lengths = [math.prod(token_grid(spec.latent_shape(*shape[1:]), a.patch)) for shape in source.shapes]
    for path, tokens in zip(source.files, lengths, strict=True):
        if tokens > a.capacity:
            raise ValueError(
                f"{path} has {tokens} tokens, more than a batch of --capacity {a.capacity} holds; raise it, or lower "
                "--max-frames or --max-side, or use a larger --patch"
            )
    segments = min(a.capacity // min(lengths), MOST_SEGMENTS)
    longest = max(len(caption.encode()) for caption in source.captions)
    return BatchConfig(
        capacity=a.capacity,
        max_segments=segments,
        text_capacity=min(segments * (longest + 2), MOST_TEXT),
        look_ahead=max(128, 2 * segments),
        caption_dropout=a.caption_dropout,
    )


def _sample(a: argparse.Namespace) -> int:
    from tqdm import tqdm

    from sora_fast.generation.engine import SAMPLERS, Engine
    from sora_fast.training.run import read_run

    if a.sampler is not None and a.sampler not in SAMPLERS:
        raise ValueError(f"--sampler {a.sampler}: it must be one of {', '.join(SAMPLERS)}")
    device, config = _device(a.device), read_run(a.run)
    request, fps = _request(a, config)
    played = _check_result(a, request, config.model.in_channels, fps)
    engine = Engine.load(a.run, device=device, text_encoder=a.text_encoder)
    if engine.networks.text is not None:
        engine.networks.text.check([a.prompt])
    with tqdm(total=a.steps, desc="sampling", unit=" steps") as bar:
        (video,) = engine.generate(
            [request],
            steps=a.steps,
            sampler=SAMPLERS.get(a.sampler),
            progress=lambda done, steps: bar.update(),
        )
    _write_result(a, video, fps)
    rate = f", {played:g} a second" if request.frames > 1 else ""
    print(f"{a.out}: {request.frames} frames of {request.height}x{request.width}{rate}")
    return 0


def _check_result(a: argparse.Namespace, request: "Request", channels: int, fps: float) -> float:
    """Before the work, not after it: frames per second that will be played."""
    from sora_fast.media import UnwritableMedia, check_output

    sizes = {"frames": request.frames, "height": request.height, "width": request.width, "channels": channels}
    try:
        return check_output(a.out, **sizes, fps=fps, scale=a.scale)
    except UnwritableMedia as error:
        raise ValueError(f"--out {error}") from error


def _write_result(a: argparse.Namespace, video: "Tensor", fps: float) -> None:
    """Or keep it elsewhere: a disk can fill up during the work."""
    from sora_fast.media import keep_unwritten, write_media

    try:
        write_media(a.out, video, fps=fps, scale=a.scale)
    except (ValueError, MemoryError) as error:
        try:
            kept = keep_unwritten(video, [a.run, Path(tempfile.gettempdir())])
        except OSError as lost:
            raise ValueError(f"--out {error}; {lost}") from error
        code = (
            "import numpy, torch; from sora_fast.media import write_media; "
            f"write_media({a.out.name!r}, torch.from_numpy(numpy.load({str(kept)!r})), fps={fps}, scale={a.scale})"
        )
        raise ValueError(f"--out {error}; kept in {kept}. To write it here: python -c {shlex.quote(code)}") from error


def _request(a: argparse.Namespace, config: "RunConfig") -> tuple["Request", float]:
    """What is asked for, and the frames per second of the result."""
    from sora_fast.generation.tasks import Request

    given = {
        option: _given(file, config) for option, file in (("--image", a.image), ("--end", a.end)) if file is not None
    }
    sizes = {tuple(clip.video.shape[2:]) for clip in given.values()} | ({a.size} if a.size else set())
    if len(sizes) > 1:
        listed = " and ".join("x".join(map(str, size)) for size in sorted(sizes))
        raise ValueError(f"--size, --image and --end must agree, but they are {listed} pixels")
    height, width = sizes.pop() if sizes else (64, 64)
    head, tail = (given[option].video if option in given else None for option in ("--image", "--end"))
    request = Request(a.prompt, a.frames, height, width, head, tail, guidance=a.guidance, seed=a.seed)
    return request, _rate(a.fps, given, config)


def _rate(asked: float | None, given: "Mapping[str, Clip]", config: "RunConfig") -> float:
    """Frames per second of the result: as asked for, else of what is given, else of the run."""
    from sora_fast.training.rates import same_rate

    rates = {option: clip.fps for option, clip in given.items() if clip.fps is not None}
    result = asked or next(iter(rates.values()), config.fps)
    if rates and config.data_fps is not None:
        rates["the run's videos"] = config.data_fps
    if any(not same_rate(rate, other) for rate in rates.values() for other in rates.values()):
        listed = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        log.warning("not the same frames per second: %s; the result has %g", listed, result)
    return result


def _report(a: argparse.Namespace) -> int:
    from sora_fast.report import write_report

    print(*write_report(a.results, a.out, loops=a.loops), sep="\n")
    return 0


def _doctor(a: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from sora_fast.doctor import examine

    device = _device(a.device)
    proof = _proof(a, device) if a.prove else None
    found = examine(device)
    if a.json:
        print(json.dumps(found.json() | {"proof": proof and asdict(proof)}, indent=1))
    else:
        print(*filter(None, (proof, found)), sep="\n\n")
    return WRONG if proof is not None and proof.having("failed") else 0


def _proof(a: argparse.Namespace, device: str) -> "Report":
    from tqdm import tqdm

    from sora_fast.proof import prove

    with tqdm(desc="proving", unit=" cases", leave=False) as bar:

        def progress(done: int, cases: int) -> None:
            bar.total = cases
            bar.update(done - bar.n)

        return prove(a.ops, minutes=a.minutes, device=device, progress=progress)


def _given(file: Path, config: "RunConfig") -> "Clip":
    """An image or clip at the size that the model was trained at."""
    from sora_fast.media import read_clip

    limits = {} if config.data is None else {"max_side": config.data.max_side, "fps": config.data.fps}
    return read_clip(file, channels=config.model.in_channels, **limits)


if __name__ == "__main__":
    sys.exit(main())
