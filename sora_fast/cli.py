"""The command line: `sora-fast demo`, `train`, `train-vae`, `distill`, `sample`, `report` and `doctor`.

Heavy imports happen inside the commands, so that --help and --version answer at once.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sora_fast.arguments import COUNT, DECAY, FINITE, POSITIVE, SEED, SHARE, WHOLE, filled, interval, path, sizes
from sora_fast.generation.options import SampleOptions
from sora_fast.training.options import (
    CHANGEABLE,
    DISTILL_CHANGEABLE,
    VAE_CHANGEABLE,
    DistillOptions,
    TrainOptions,
    VAEOptions,
    spelled,
)
from sora_fast.training.recipe import CPU, GPU, HEAD_DIM, LR, VAE_LR

if TYPE_CHECKING:
    from sora_fast.proof import Report
    from sora_fast.training.distributed import World
    from sora_fast.training.run import TrainConfig
    from sora_fast.training.trainer import Trainer

WRONG, BAD_INPUT, INTERRUPTED = 1, 2, 130

DROP_HELP = """share of a sample's tokens that are left out, for more samples a second: 0.5, always so much; beta:0.5,
another one for every sample, so much in the mean; resolution:0.2-0.6, from the smallest to the largest sample;
decreasing:0.8-0.2, over the run, which needs --steps (default: none)"""

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

VAE_HELP = """\
Train a small network that compresses videos, on a folder of your own, and then a video model on what it makes of them.

  sora-fast train-vae --data clips --out runs/vae --minutes 30
  sora-fast train --data clips --codec runs/vae --out runs/first --minutes 30

It learns from parts of the videos, of random lengths, sizes and places. Ctrl-C saves; it goes on, for longer, with:

  sora-fast train-vae --resume --out runs/vae --minutes 60
"""

DISTILL_HELP = """\
Make a model that needs a few steps, without guidance, of one that `sora-fast train` has made.

  sora-fast distill runs/first --steps 4
  sora-fast sample runs/first-distilled --prompt "a red ball" --frames 16 --size 64x64 --out ball.mp4

It is trained further, on the same data, in a folder of its own; any number of steps can be asked of it. Ctrl-C saves;
it goes on with:

  sora-fast distill runs/first --resume
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
        return _fail(f"{error}; pip install 'sora_fast[demo,text,vae,log]' brings the optional parts")
    except OSError as error:
        known = error.filename is not None and error.strerror
        return _fail(f"{error.filename}: {error.strerror}" if known else str(error))
    except (ValueError, TypeError, FloatingPointError) as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        from sora_fast.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        advice = {
            "train": "a smaller --capacity or model",
            "train-vae": "a smaller --capacity or --crop",
            "sample": "a smaller --size or fewer --frames",
        }
        return _fail(f"out of memory ({str(error).strip()}); {advice.get(argv[0], 'less at once')} may fit")


def _fail(message: str) -> int:
    rank = int(os.environ.get("RANK", "0"))  # of several workers each may have its own
    print(f"sora-fast: error{f' of worker {rank}' if rank else ''}: {message}", file=sys.stderr)
    return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sora-fast", description="Train small, fast video diffusion transformers.")
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show the version and exit"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_parser("demo", help="train on moving digits, sample, measure: the whole thing in minutes")
    _add_train(commands)
    _add_train_vae(commands)
    _add_distill(commands)
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
    defaults = _defaults(TrainOptions)
    add = parser.add_argument_group("what and where").add_argument
    add(
        "--data",
        metavar="FOLDER",
        type=filled,
        help="videos, images and their captions; beside --resume: where they are now",
    )
    add("--out", metavar="RUN", required=True, type=path, help="folder of the run: configuration, log, checkpoints")
    add(
        "--resume",
        action="store_true",
        help=f"go on with the run in --out as it was, except for {spelled(CHANGEABLE)}",
    )
    add(
        "--replay",
        action="store_true",
        help="run the step again, alone, that the run in --out broke off at as not finite, and say where it goes wrong",
    )
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add = parser.add_argument_group("how long, in all (one of the two)").add_argument
    add("--minutes", type=POSITIVE, help="train for so long (default: 30)")
    add("--steps", type=COUNT, help="train for so many steps; resuming then gives the same bits as never stopping")
    add = parser.add_argument_group("data").add_argument
    add("--max-frames", type=COUNT, help=f"frames of a clip (default: {defaults.max_frames})")
    add(
        "--clips",
        choices=("anywhere", "first"),
        help="of a longer video: clips from anywhere, as many an epoch as fit into it, none over a scene cut that "
        "clip.cuts (seconds, one a line) or PySceneDetect's clip-Scenes.csv lists; or its first frames alone "
        f"(default: {defaults.clips})",
    )
    add("--max-side", type=COUNT, help=f"longer sides are scaled down to this (default: {defaults.max_side} pixels)")
    add(
        "--fps",
        type=POSITIVE,
        help="sample videos at this rate, which is then that of what is made (default: every frame, and the rate that "
        "most videos have)",
    )
    add("--grey", action="store_true", help="one grey channel in place of RGB")
    add(
        "--workers",
        type=WHOLE,
        help="processes that read the data, for each training process; 0: a thread (default: 0 on a CPU, since the "
        "step needs the cores; beside a GPU a core each but one, at most 8). Changes nothing in what is trained",
    )
    add = parser.add_argument_group("model").add_argument
    add("--dim", type=COUNT, help=f"width (default: {CPU.dim} on a CPU, {GPU.dim} on a GPU)")
    add("--depth", type=COUNT, help=f"transformer blocks (default: {CPU.depth}, or {GPU.depth} on a GPU)")
    add("--heads", type=COUNT, help=f"attention heads (default: one for {HEAD_DIM} of the width)")
    add("--patch", type=sizes("1x4x4"), metavar="TxHxW", help="pixels in a token (default: 1x8x8, or 1x4x4 on a GPU)")
    add(
        "--text-encoder",
        metavar="FOLDER",
        type=filled,
        help="a CLIP or T5 saved there, which takes 77 or 226 tokens of a caption (default: a small one, trained "
        "along, which takes 255 bytes); beside --resume: where it is now",
    )
    add(
        "--codec",
        metavar="FOLDER",
        type=filled,
        help="what `sora-fast train-vae` made, or one of diffusers' saved there (Wan, HunyuanVideo, CogVideoX, LTX, "
        "Mochi): train on its latents, made by the data workers as they read (default: on pixels); beside --resume: "
        "where it is now",
    )
    add = parser.add_argument_group("training").add_argument
    add(
        "--capacity",
        type=COUNT,
        help=f"tokens in a batch (default: about {CPU.capacity}, or {GPU.capacity} on a GPU; more if a file is longer)",
    )
    add("--optimizer", choices=("adamw", "muon"), help=f"default: {defaults.optimizer}")
    add("--lr", type=POSITIVE, help=f"peak learning rate (default: {LR['muon']:g}, with adamw {LR['adamw']:g})")
    add(
        "--ema-decay",
        type=DECAY,
        help=f"of the averaged weights (default: {CPU.ema_decay}, or {GPU.ema_decay} on a GPU)",
    )
    add("--caption-dropout", type=SHARE, help=f"share of captions left out (default: {defaults.caption_dropout})")
    add("--drop", metavar="RULE", type=filled, help=DROP_HELP)
    add("--save-every", type=COUNT, help=f"steps between checkpoints (default: {defaults.save_every})")
    add("--seed", type=SEED, help=f"default: {defaults.seed}")
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        help="of products and activations; auto measures whether bfloat16 is faster here (default: auto)",
    )
    add("--accumulate", type=COUNT, metavar="N", help="batches a step: as one that is N times as large (default: 1)")
    add(
        "--recompute",
        choices=("block", "selective"),
        help="keep less for the backward pass and compute it again: all of a block, or all but products and attention",
    )
    add(
        "--compile",
        choices=("auto", "blocks", "model"),
        help="what torch.compile makes one graph of: the blocks, which starts sooner, or model and loss, whose steps "
        "are quicker on a CPU (default: auto, that is model there in a run of 250 steps, or a minute, a block)",
    )
    add("--no-compile", action="store_true", help="without torch.compile: starts sooner, runs slower")
    add(
        "--graph",
        action=argparse.BooleanOptionalAction,
        help="on a GPU, launch a step as one CUDA graph: less work for the host (default: no)",
    )
    add = parser.add_argument_group("what is told meanwhile, beside the run's log.jsonl and loss.png").add_argument
    add("--sample-every", type=COUNT, metavar="STEPS", help="a sheet of samples so often, in the run's samples/")
    _add_telling(add)


def _add_train_vae(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "train-vae",
        help="train the network that compresses videos",
        description=VAE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # so that --resume knows what was asked for
    )
    parser.set_defaults(command=_train_vae)
    defaults = _defaults(VAEOptions)
    add = parser.add_argument_group("what and where").add_argument
    add("--data", metavar="FOLDER", type=filled, help="videos and images; beside --resume: where they are now")
    add("--out", metavar="RUN", required=True, type=path, help="folder of the run: configuration, log, checkpoints")
    add(
        "--resume",
        action="store_true",
        help=f"go on with the run in --out as it was, except for {spelled(VAE_CHANGEABLE)}",
    )
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add = parser.add_argument_group("how long, in all (one of the two)").add_argument
    add("--minutes", type=POSITIVE, help="train for so long (default: 30)")
    add("--steps", type=COUNT, help="train for so many steps; resuming then gives the same bits as never stopping")
    add = parser.add_argument_group("data").add_argument
    add("--max-frames", type=COUNT, help=f"frames of a part, at the most (default: {defaults.max_frames})")
    add("--crop", type=COUNT, help=f"its longest side (default: {defaults.crop} pixels)")
    add("--max-side", type=COUNT, help=f"videos are first scaled down to this (default: {defaults.max_side} pixels)")
    add("--clips", choices=("anywhere", "first"), help=f"as of `sora-fast train` (default: {defaults.clips})")
    add("--fps", type=POSITIVE, help="sample videos at this rate (default: every frame)")
    add("--grey", action="store_true", help="one grey channel in place of RGB")
    add("--workers", type=WHOLE, help="processes that read the data; 0: a thread (default: as of `sora-fast train`)")
    add = parser.add_argument_group("network").add_argument
    add("--strides", type=sizes("4x4x4"), metavar="TxHxW", help="4x4x4 or 4x8x8 pixels a latent (default: 4x4x4)")
    add("--channels", type=COUNT, help=f"numbers a latent (default: {defaults.channels})")
    add = parser.add_argument_group("training").add_argument
    add("--kl", type=FINITE, help=f"weight of the divergence from noise (default: {defaults.kl:g})")
    add("--absolute", type=FINITE, help="weight of absolute errors beside squares (default: 0)")
    add("--capacity", type=COUNT, help="latents a step (default: those of the largest part, on a GPU of eight)")
    add("--lr", type=POSITIVE, help=f"peak learning rate (default: {VAE_LR:g})")
    add("--ema-decay", type=DECAY, help=f"of the averaged weights (default: {defaults.ema_decay})")
    add("--save-every", type=COUNT, help=f"steps between checkpoints (default: {defaults.save_every})")
    add("--seed", type=SEED, help=f"default: {defaults.seed}")
    add("--precision", choices=("float32", "bfloat16"), help=f"of products (default: {defaults.precision})")
    add = parser.add_argument_group("what is told meanwhile, beside the run's log.jsonl and loss.png").add_argument
    _add_telling(add)


def _add_distill(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "distill",
        help="make a trained model fast: a few steps, no guidance",
        description=DISTILL_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # so that --resume knows what was asked for
    )
    parser.set_defaults(command=_distill)
    defaults = _defaults(DistillOptions)
    add = parser.add_argument
    add("run", metavar="RUN", type=path, help="folder of a run: what `sora-fast train --out` made")
    add("--out", metavar="NEW", type=path, help="folder of the new run (default: RUN-distilled)")
    add("--steps", type=COUNT, help=f"that `sample` takes where none are asked for (default: {defaults.steps})")
    add("--minutes", type=POSITIVE, help=f"train for so long (default: {defaults.minutes:g})")
    add(
        "--guidance",
        type=FINITE,
        help=f"to build in, since `sample` cannot change it any more (default: {defaults.guidance:g})",
    )
    add("--guidance-given", type=FINITE, help="likewise, where frames are given (default: the same)")
    add("--lr", type=POSITIVE, help="peak learning rate (default: half the run's)")
    add("--seed", type=SEED, help=f"default: {defaults.seed}")
    add("--no-compile", action="store_true", help="without torch.compile: starts sooner, runs slower")
    add(
        "--resume",
        action="store_true",
        help=f"go on with the run in NEW as it was, except for {spelled(DISTILL_CHANGEABLE)}",
    )
    add("--data", metavar="FOLDER", type=filled, help="where the run's data is, if it is not where it was")
    add(
        "--text-encoder",
        metavar="FOLDER",
        type=filled,
        help="where the run's CLIP or T5 is, if it is not where it was",
    )
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add = parser.add_argument_group("what is told meanwhile, beside the run's log.jsonl and loss.png").add_argument
    _add_telling(add)


def _add_telling(add: Callable[..., argparse.Action]) -> None:
    add("--json", action="store_true", help="print the lines of the log; all else goes to standard error")
    add("--tensorboard", action="store_true", help="write for TensorBoard, in the run's tensorboard/")


def _add_sample(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "sample",
        help="make a video with a trained model",
        description=SAMPLE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_sample, **vars(_defaults(SampleOptions)))
    add = parser.add_argument
    add("run", metavar="RUN", type=path, help="folder of a run: what `sora-fast train --out` made")
    add("--out", type=path, required=True, help="file to write: .mp4, .gif, or .png for one frame")
    add(
        "--prompt",
        help="what is to be seen; cut where it is longer than the run's text encoder takes: 255 bytes (the small one), "
        "77 tokens (CLIP) or 226 (T5)",
    )
    add("--frames", type=COUNT, help="frames of the whole result (default: %(default)s)")
    add("--size", type=sizes("64x48"), metavar="HxW", help="height x width in pixels (default: 64x64, or the image's)")
    add(
        "--image",
        type=path,
        metavar="FILE",
        help="image or clip to begin with, scaled down as the run's own files were; its frames are kept",
    )
    add("--end", type=path, metavar="FILE", help="image or clip to end with, of the same size")
    add(
        "--guidance",
        type=FINITE,
        help="1: none; more follows the prompt closer (default: 2; a distilled run has its own, which stays)",
    )
    add(
        "--guidance-interval",
        type=interval,
        metavar="LOW:HIGH",
        help="guide at noise levels between these only, such as 0:0.8 (0 is clean); a step without guidance takes half "
        "the time (default: at all)",
    )
    add("--steps", type=COUNT, help="steps of the sampler (default: 30, or what the run was distilled for)")
    add("--sampler", help="euler, heun, ddim, dpm++, ddpm or flow-map (default: what suits the run)")
    add(
        "--cache",
        type=DECAY,
        metavar="SHARE",
        help="do without most of the network in steps whose first block changes by less than this, as 0.2: sooner, "
        "but not the same video; takes 8 steps at least (default: never)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="with torch.compile (default: on a CPU, where that takes less time in all)",
    )
    add(
        "--graph",
        action=argparse.BooleanOptionalAction,
        help="launch a step as one CUDA graph (default: on a GPU, from the third step on, where there is no --cache)",
    )
    add("--seed", type=SEED, help="another seed, another video (default: %(default)s)")
    add("--fps", type=POSITIVE, help="frames per second of the result (default: those of the given clip or of the run)")
    add("--scale", type=COUNT, help="enlarge every pixel so many times (default: %(default)s)")
    add(
        "--text-encoder",
        metavar="FOLDER",
        type=filled,
        help="where the run's CLIP or T5 is, if it is not where it was",
    )
    add("--codec", metavar="FOLDER", type=filled, help="where the run's codec is, if it is not where it was")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")


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
        type=path,
        help="JSON of benchmarks.gpu_suite or pytest --benchmark-json; later files are compared with the first",
    )
    add("--out", type=path, default=Path("report.html"), help="page to write (default: %(default)s)")
    add("--loops", type=path, metavar="FILE", help="JSON of benchmarks.aot: also show the kernels' hot loops")


def _add_doctor(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "doctor",
        help="what runs here, and why; prove the kernels on this GPU",
        description="Show versions, devices, the backend that every op runs on by default, and why.",
    )
    parser.set_defaults(command=_doctor)
    add = parser.add_argument
    add("--prove", action="store_true", help="first hold the kernels to fp64 here, and record what is right")
    add("--minutes", type=POSITIVE, default=2.0, help="that proving may take (default: %(default)g)")
    add("--ops", nargs="+", metavar="OP", help="prove these alone (default: all that have kernels)")
    add("--device", default=None, help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add("--json", action="store_true", help="print JSON")


def _defaults(options: type) -> argparse.Namespace:
    return argparse.Namespace(**{f.name: f.default for f in fields(options) if f.default is not MISSING})


def _train(a: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(a).items() if name != "command"}
    options = TrainOptions(**given, given=frozenset(given.keys() - {"out"}))
    if options.replay:
        return _replay(options)
    if not options.resume and options.data is None:
        raise ValueError("train needs --data FOLDER, for a new run, or --resume")
    with _workers(options.device, json=options.json) as (device, world, lines):
        return _train_together(options, device, world, lines)


def _train_vae(a: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(a).items() if name != "command"}
    options = VAEOptions(**given, given=frozenset(given.keys() - {"out"}))
    if not options.resume and options.data is None:
        raise ValueError("train-vae needs --data FOLDER, for a new run, or --resume")
    with _workers(options.device, json=options.json) as (device, world, lines):
        return _train_vae_together(options, device, world, lines)


def _distill(a: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(a).items() if name != "command"}
    options = DistillOptions(**given, given=frozenset(given.keys() - {"run"}))
    with _workers(options.device, json=options.json) as (device, world, lines):
        return _distill_together(options, device, world, lines)


@contextlib.contextmanager
def _workers(device: str | None, *, json: bool) -> "Iterator[tuple[str, World, IO[str]]]":
    """What this worker computes on, all of them, and where --json goes; the user hears the first.

    json: inside, what is printed goes to standard error.
    """
    from sora_fast.training.distributed import joined, own_device

    device, lines = own_device(device), sys.stdout
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(joined(device))
        if json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if world.rank:
            stack.enter_context(contextlib.redirect_stdout(None))
            logging.getLogger().setLevel(logging.ERROR)
        yield device, world, lines


def _replay(o: TrainOptions) -> int:
    from sora_fast.training.distributed import own_device
    from sora_fast.training.replay import replay

    if others := sorted(o.given - {"replay", "device"}):
        raise ValueError(f"{spelled(others)}: beside --replay there can be --out and --device")
    for finding in replay(o.out, own_device(o.device)):
        print(finding)
    return 0


def _train_together(o: TrainOptions, device: str, world: "World", lines: IO[str]) -> int:
    """What each of the workers does. lines: where --json goes."""
    from sora_fast.generation.watching import watchers_of
    from sora_fast.training.beginning import fitted, new_config, resumed_config
    from sora_fast.training.data.sources import FolderSource
    from sora_fast.training.trainer import Trainer

    config = resumed_config(o, device) if o.resume else new_config(o, device)
    source = FolderSource(config.data, progress=world.rank == 0, world=world)
    print(source.summary)
    if not o.resume:
        config = fitted(config, o, source, device)
    if source.rate_summary:
        print(f"{source.rate_summary}; what is made will run at {config.fps:g}")
    if not o.resume and o.precision == "auto" and config.train.precision != "float32":
        print(f"computing in {config.train.precision}, measured to be faster here (--precision float32: not)")
    watchers = watchers_of(o, config, source, device, lines) if world.rank == 0 else ()
    trainer = Trainer(config, source, o.out, device=device, resume=o.resume, watchers=watchers)
    if trainer.networks.text is not None:
        trainer.networks.text.check(source.captions)
    resume = f"sora-fast train --resume --out {o.out}"
    try:
        return _fit(trainer, resume, resumed=o.resume, progress=not o.json)
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{error}. To see where: sora-fast train --replay --out {o.out}. To go on from the last checkpoint with a "
            f"smaller rate: {resume} --lr {config.train.lr / 3:.1g}"
        ) from error


def _train_vae_together(o: VAEOptions, device: str, world: "World", lines: IO[str]) -> int:
    """Likewise."""
    from sora_fast.generation.watching import plain_watchers
    from sora_fast.training.data.sources import FolderSource
    from sora_fast.training.vae import VAETrainer
    from sora_fast.training.vae_beginning import new_vae, resumed_vae

    config = resumed_vae(o) if o.resume else new_vae(o, device)
    source = FolderSource(config.data, progress=world.rank == 0, world=world)
    print(source.summary)
    watchers = plain_watchers(o.out, lines if o.json else None, tensorboard=o.tensorboard) if world.rank == 0 else ()
    trainer = VAETrainer(config, source, o.out, device=device, resume=o.resume, watchers=watchers)
    use = f"sora-fast train --data {config.data.folder} --codec {o.out} --out …"
    return _fit(trainer, f"sora-fast train-vae --resume --out {o.out}", use, resumed=o.resume, progress=not o.json)


def _distill_together(o: DistillOptions, device: str, world: "World", lines: IO[str]) -> int:
    """Likewise."""
    from sora_fast.generation.watching import plain_watchers
    from sora_fast.training.data.sources import FolderSource
    from sora_fast.training.distill import Distiller, keep_teacher, new_distillation, resumed_distillation

    config = resumed_distillation(o) if o.resume else new_distillation(o)
    source = FolderSource(config.data, progress=world.rank == 0, world=world)
    print(source.summary)
    if not o.resume and world.rank == 0:
        keep_teacher(o.run, o.folder)
    world.total(0)  # nobody looks before that
    watchers = plain_watchers(o.folder, lines if o.json else None, tensorboard=o.tensorboard) if world.rank == 0 else ()
    trainer = Distiller(config, source, o.folder, device=device, resume=o.resume, watchers=watchers)
    place = "" if o.out is None else f" --out {o.out}"
    return _fit(trainer, f"sora-fast distill {o.run}{place} --resume", resumed=o.resume, progress=not o.json)


def _fit(trainer: "Trainer", resume: str, use: str | None = None, *, resumed: bool, progress: bool = True) -> int:
    """Train to the end, and say what there is to do then. resume: the command that goes on. use: the one that makes use
    of the result; None: samples of it."""
    if resumed:
        print(f"going on from step {trainer.step}")
    if trainer.compiling is not None:
        print(trainer.compiling)
    before = trainer.step
    finished = trainer.fit(progress=progress)
    if trainer.skipped_steps:
        print(f"{trainer.skipped_steps} steps were skipped: their loss or gradient was not finite")
    if not finished:
        print(f"Saved at step {trainer.step}. To go on: {resume}")
        return INTERRUPTED
    if resumed and trainer.step == before:
        print(f"It was at its end already. To train it for longer: {resume} {_longer(trainer.config)}")
    use = (
        f"To sample: sora-fast sample {trainer.folder} --prompt … --out clip.mp4"
        if use is None
        else f"To use it: {use}"
    )
    print(f"Done: {trainer.step} steps. {use}")
    return 0


def _longer(config: "TrainConfig") -> str:
    """The option that doubles what a run was given."""
    return f"--minutes {2 * config.minutes:g}" if config.steps is None else f"--steps {2 * config.steps}"


def _sample(a: argparse.Namespace) -> int:
    from tqdm import tqdm

    from sora_fast.generation.asking import check_result, requested, write_result
    from sora_fast.generation.engine import SAMPLERS, Engine, default_steps
    from sora_fast.generation.latency import Clock
    from sora_fast.training.distributed import own_device
    from sora_fast.training.run import moved, read_run

    o = SampleOptions(**{name: value for name, value in vars(a).items() if name != "command"})
    if o.sampler is not None and o.sampler not in SAMPLERS:
        raise ValueError(f"--sampler {o.sampler}: it must be one of {', '.join(SAMPLERS)}")
    device, config = own_device(o.device), moved(read_run(o.run), codec=o.codec)
    request, fps = requested(o, config)
    played = check_result(o, request, config.video_channels, fps)
    engine = Engine.load(
        o.run, device=device, text_encoder=o.text_encoder, codec=o.codec, compile=o.compile, graph=o.graph
    )
    if engine.networks.text is not None:
        engine.networks.text.check([o.prompt])
    asked = {"steps": o.steps, "sampler": SAMPLERS.get(o.sampler)}
    print(engine.forecast([request], **asked))
    with tqdm(total=o.steps or default_steps(config), desc="sampling", unit=" steps") as bar:
        (made,) = engine.make(
            [request],
            **asked,
            cache=o.cache,
            progress=lambda done, steps: bar.update(),
        )
    clock = Clock()
    write_result(o, made, fps)
    engine.latency.decoded = clock.lap()
    print(engine.latency)
    rate = f", {played:g} a second" if request.frames > 1 else ""
    print(f"{o.out}: {request.frames} frames of {request.height}x{request.width}{rate}")
    return 0


def _report(a: argparse.Namespace) -> int:
    from sora_fast.report import write_report

    print(*write_report(a.results, a.out, loops=a.loops), sep="\n")
    return 0


def _doctor(a: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from sora_fast.doctor import examine
    from sora_fast.training.distributed import own_device

    device = own_device(a.device)
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


if __name__ == "__main__":
    sys.exit(main())
