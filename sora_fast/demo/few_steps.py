"""The demo's model in a few steps: distilled from a finished demo, and measured beside it.

python -m sora_fast.demo.few_steps runs/demo
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from sora_fast import files
from sora_fast.arguments import POSITIVE, SEED
from sora_fast.arguments import path as path_argument
from sora_fast.demo.detector import DigitDetector
from sora_fast.demo.digits import MovingDigits, Shape
from sora_fast.demo.metrics import prompts
from sora_fast.demo.run import (
    CONTINUED,
    EVALUATION_SEED,
    FULL,
    INTERRUPTED,
    WORKERS,
    Plan,
    _continued,
    _from_prompts,
    training_record,
)
from sora_fast.generation.engine import Engine
from sora_fast.generation.tasks import Request, text_to_video
from sora_fast.training.distill import Distiller, distilled_config, keep_teacher
from sora_fast.training.distributed import joined, launch, launched
from sora_fast.training.run import Distilled, RunConfig, check_new, read_run

MINUTES = 4.8
CALLS = (2, 4, 8)
ROUNDS = 7  # of the clock: a median of so many, the two models taking turns


def main(argv: Sequence[str] | None = None) -> int:
    """Distil and measure; returns the exit code: 0, or 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(argv)
    teacher, folder = arguments.demo / "run", arguments.out or arguments.demo / "few_steps"
    if not arguments.resume:
        check_new(folder / "run")
    if WORKERS > 1 and not launched():
        return launch(WORKERS, ["-m", "sora_fast.demo.few_steps", *argv])
    with joined() as world:
        if world.rank == 0 and not arguments.resume:
            keep_teacher(teacher, folder / "run")
        world.total(0)  # nobody looks before that
        config = (
            read_run(folder / "run")
            if arguments.resume
            else few_steps_config(read_run(teacher), minutes=arguments.minutes, seed=arguments.seed, workers=world.size)
        )
        finished = Distiller(config, MovingDigits(seed=0), folder / "run", resume=arguments.resume).fit()
    if world.rank or not finished:
        return 0 if finished else INTERRUPTED
    torch.set_num_threads(world.size * torch.get_num_threads())  # the others are done
    # Left alone, an engine compiles once it has worked enough to save the start-up: the teacher, and not the student.
    engines = (Engine.load(run, compile=FULL.compile) for run in (teacher, folder / "run"))
    results = compare(*engines, FULL, CALLS)
    results = {"training": training_record(folder / "run"), **results}
    files.write_text(folder / "few_steps.json", json.dumps(results, indent=2) + "\n")
    print(summary(results))
    print(f"Everything is in {folder}: few_steps.json, run/")
    return 0


def few_steps_config(teacher: RunConfig, *, minutes: float, seed: int = 0, workers: int = 1) -> RunConfig:
    """How the demo's model is distilled, on the clips that it was trained on; the workers share out the tokens."""
    batch = replace(
        teacher.train.batch, capacity=1280 // workers, max_segments=80 // workers, text_capacity=1920 // workers
    )
    train = replace(teacher.train, minutes=minutes, batch=batch, lr=1e-3, warmup=30, ema_decay=0.99, seed=seed)
    return distilled_config(teacher, train, Distilled(4, FULL.guidance, FULL.guidance_given, spacing="late"))


def compare(teacher: Engine, student: Engine, plan: Plan, calls: Sequence[int]) -> dict:
    """What the JSON says: scores of the teacher as the demo asks it, and of the student in so many calls; the clock."""
    asked = {"teacher": (teacher, plan)} | {
        f"{count} calls": (student, replace(plan, guidance=1.0, guidance_given=1.0, steps=count)) for count in calls
    }
    source = MovingDigits(seed=EVALUATION_SEED)
    results = {name: _scores(*one, source) for name, one in tqdm(asked.items(), desc="sampling")}
    shape = source.config.seen[0]
    away = _away(asked, shape)
    return {
        "asked": {"teacher": {"steps": plan.steps, "guidance": plan.guidance, "guidance_given": plan.guidance_given}},
        "compiled": [teacher.compiled, student.compiled],
        "scores": results,
        "distance to the teacher's clip": {"shape": shape, "of another seed": away.pop("another"), **away},
        "seconds": {"of one clip": _clock(asked, shape, 1), "of 40 clips": _clock(asked, shape, 40)},
    }


def _scores(engine: Engine, plan: Plan, source: MovingDigits) -> dict:
    detector = DigitDetector()
    groups = {"seen": source.config.seen, "unseen": source.config.unseen}
    with tqdm(disable=True) as bar:
        scores = {name: _from_prompts(engine, detector, shapes, plan, bar)[0] for name, shapes in groups.items()}
    return scores | {task.name: _continued(engine, source, task, plan)[0] for task in CONTINUED}


def _away(asked: dict[str, tuple[Engine, Plan]], shape: Shape) -> dict[str, float]:
    """Root of the mean squared difference to the teacher's clips, of the same noise; "another": of theirs, of other
    noise. A detector may be pleased by clips that are no longer the teacher's: this one is not."""

    def clips(name: str, first_seed: int = 0) -> torch.Tensor:
        engine, plan = asked[name]
        return torch.stack(engine.generate(list(_requests(shape, 40, plan, first_seed)), steps=plan.steps))

    teacher = clips("teacher")
    made = {name: clips(name) for name in asked if name != "teacher"} | {"another": clips("teacher", 1000)}
    return {name: (video - teacher).square().mean().sqrt().item() for name, video in made.items()}


def _clock(asked: dict[str, tuple[Engine, Plan]], shape: Shape, count: int) -> dict[str, float]:
    """Median seconds of `Engine.generate` for so many clips at once."""
    taken: dict[str, list[float]] = {name: [] for name in asked}
    for turn in range(ROUNDS + 1):
        for name, (engine, plan) in asked.items():
            began = time.perf_counter()
            engine.generate(list(_requests(shape, count, plan)), steps=plan.steps)
            if turn:  # the first one warms up
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _requests(shape: Shape, count: int, plan: Plan, first_seed: int = 0) -> Iterator[Request]:
    frames, *size = shape
    for index, caption in enumerate(prompts()[:count]):
        yield text_to_video(caption, frames, tuple(size), guidance=plan.guidance, seed=first_seed + index)


def summary(results: dict) -> str:
    """A short table of the JSON."""
    columns = ("digit", "direction", "digit*", "direction*", "1 clip", "40 clips", "from teacher")
    lines = ["", f"{'':10}" + "".join(f"{column:>13}" for column in columns)]
    for name, scores in results["scores"].items():
        rights = [scores[group][what]["right"] for group in ("seen", "unseen") for what in ("digit", "direction")]
        clock = [results["seconds"][kind][name] for kind in ("of one clip", "of 40 clips")]
        away = results["distance to the teacher's clip"].get(name, 0.0)
        cells = [*(f"{right:.1%}" for right in rights), *(f"{seconds:.3f} s" for seconds in clock), f"{away:.3f}"]
        lines.append(f"{name:10}" + "".join(f"{cell:>13}" for cell in cells))
    other = results["distance to the teacher's clip"]["of another seed"]
    return "\n".join([*lines, f"* of shapes never seen. The teacher's own clips of another seed: {other:.3f} away"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sora_fast.demo.few_steps", description=__doc__)
    add = parser.add_argument
    add("demo", type=path_argument, help="folder of a finished demo (sora-fast demo --out)")
    add("--out", type=path_argument, help="folder for everything (default: few_steps in that of the demo)")
    add("--minutes", type=POSITIVE, default=MINUTES, help="distil for so long (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="of noise (default: %(default)s)")
    add("--resume", action="store_true", help="go on with one that was stopped")
    return parser


if __name__ == "__main__":
    sys.exit(main())
