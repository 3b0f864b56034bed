"""The demo: a model trained from scratch on moving digits, asked for clips of many shapes, and judged by a detector."""

import argparse
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sora_fast import files
from sora_fast.arguments import number
from sora_fast.arguments import path as path_argument
from sora_fast.demo.detector import DigitDetector
from sora_fast.demo.digits import DigitsConfig, MovingDigits, Scene, Shape
from sora_fast.demo.metrics import (
    clean_frames_identical,
    detector_ceiling,
    next_position,
    prompt_scores,
    prompts,
)
from sora_fast.diffusion.paths import RectifiedFlow
from sora_fast.generation.engine import Engine
from sora_fast.generation.tasks import Request, extend, image_to_video, text_to_video
from sora_fast.media import check_output, write_media
from sora_fast.media.sheet import Strip, contact_sheet
from sora_fast.models import SoraDiTConfig
from sora_fast.training.curve import loss_curve
from sora_fast.training.data.batches import BatchConfig
from sora_fast.training.distributed import joined, launch, launched
from sora_fast.training.run import LOG, RunConfig, TextConfig, TrainConfig, read_run
from sora_fast.training.runlog import read_log
from sora_fast.training.trainer import Trainer

INTERRUPTED = 130
MARK = ".sora_fast_demo"  # stands in a folder that a demo made, and so may replace
# Another stream than the one trained on: its clips show scans of the same half in places and pairs not drawn before.
EVALUATION_SEED = 1
# Two trainers on a core each see a third more clips than one on both cores: most of a step is too small to share out.
WORKERS = min(2, torch.get_num_threads())
FPS, SCALE = 8, 6
CLIPS = (".mp4", ".gif")


@dataclass(frozen=True)
class Plan:
    """How long the demo trains, and how much it asks of the result.

    minutes: of training. compile: worth its half minute in a long run only. continued: clips that image-to-video and
    extension are measured on. guidance, steps: of the sampler. guidance_given: where frames are given, which show the
    digit already (next position after one: off by 0.64 pixels with 2, by 0.85 with 4).
    """

    minutes: float
    compile: bool
    continued: int = 40
    guidance: float = 4.0
    guidance_given: float = 2.0
    steps: int = 16


FULL = Plan(minutes=9.3, compile=True)
QUICK = Plan(minutes=1.0, compile=False, continued=20, steps=8)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code: 0, or 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    plan = QUICK if arguments.quick else FULL
    if arguments.minutes is not None:
        plan = replace(plan, minutes=arguments.minutes)
    if WORKERS > 1 and not launched():
        return launch(WORKERS, ["-m", "sora_fast.cli", "demo", *(sys.argv[1:] if argv is None else argv)])
    folder = arguments.out
    with joined() as world:
        if world.rank == 0:
            _prepare(folder, resume=arguments.resume)
        world.total(0)  # nobody looks before that
        finished = train(plan, folder, arguments.seed, resume=arguments.resume, workers=world.size)
    if world.rank:
        return 0 if finished else INTERRUPTED
    going_on = f"To go on: make demo ARGS='--resume{' --quick' if arguments.quick else ''} --out {folder}'"
    if not finished:
        print(f"Saved. {going_on}")
        return INTERRUPTED
    torch.set_num_threads(world.size * torch.get_num_threads())  # the others are done
    torch.manual_seed(arguments.seed)
    began = time.monotonic()
    try:
        results, strips = evaluate(Engine.load(folder / "run"), plan)
        results = {"training": training_record(folder / "run"), **results}
        results["seconds"] = round(results["training"]["seconds"] + time.monotonic() - began, 1)
        files.write_text(folder / "metrics.json", json.dumps(results, indent=2) + "\n")
        print(summary(results))
        _draw(strips, folder)
    except KeyboardInterrupt:
        print(f"Stopped while sampling; the trained model is kept. {going_on}")
        return INTERRUPTED
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; the trained model is kept. {going_on}") from error
    print(f"Everything is in {folder}: contact_sheet.png, loss.png, metrics.json, clips/*.mp4 and *.gif")
    return 0


def train(plan: Plan, folder: Path, seed: int, *, resume: bool, workers: int) -> bool:
    """What every worker does; True if the run is at its end."""
    config = read_run(folder / "run") if resume else run_config(plan, seed=seed, workers=workers)
    return Trainer(config, MovingDigits(seed=0), folder / "run", resume=resume).fit()


def _prepare(folder: Path, *, resume: bool) -> None:
    """A folder that takes what will be written, and holds no earlier demo but one that goes on."""
    if resume:
        read_run(folder / "run")
    _check_clips(folder)
    if not resume:
        _clear(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()


def _check_clips(folder: Path) -> None:
    """Before ten minutes of work: what `_draw` will write, at the largest."""
    config = DigitsConfig()
    shapes = (*config.seen, *config.unseen, *(task.shape for task in CONTINUED))
    frames, height, width = map(max, zip(*shapes, strict=True))
    sizes = {"frames": frames, "height": height, "width": width, "channels": 1}
    for suffix in CLIPS:
        check_output(folder / "clips" / f"clip{suffix}", **sizes, fps=FPS, scale=SCALE)


def _clear(folder: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    if (folder / MARK).exists():
        print(f"replacing the earlier demo in {folder}")
        for part in ("run", "clips"):
            shutil.rmtree(folder / part, ignore_errors=True)
        for file in ("metrics.json", "loss.png", "contact_sheet.png"):
            (folder / file).unlink(missing_ok=True)


def run_config(plan: Plan, *, seed: int = 0, workers: int = 1) -> RunConfig:
    """The model and recipe of the demo; the workers share out the tokens of a step."""
    # The captions' words are all there is to know: their n-grams, without layers on top.
    text = TextConfig(dim=64, layers=0, max_bytes=63)
    return RunConfig(
        model=SoraDiTConfig(
            dim=128,
            depth=4,
            heads=4,
            in_channels=1,
            # As large as a digit. Of as many pixels, 4×4×4, the same 1.5M tokens taught 18% of the digits, not 84%.
            patch_size=(1, 8, 8),
            pooled_dim=text.dim,
            position="rope+sincos3d",
            rope_theta=100.0,
            position_bias=1.0,
        ),
        train=TrainConfig(
            minutes=plan.minutes,
            # 40 clips or so, over all workers. Half as many teach a little more a clip, but keep the cores less busy.
            batch=BatchConfig(
                capacity=2048 // workers, max_segments=128 // workers, text_capacity=3072 // workers, look_ahead=256
            ),
            # After 800 steps Muon's loss was 0.103 where AdamW's, at a rate of its own, was 0.130. With AdamW at
            # Muon's rate, not at a third of it, fewer digits came out right (36% against 46% of stills after 400).
            optimizer="muon",
            lr=3e-3,
            muon_ratio=3.0,
            warmup=50,
            ema_decay=0.995,
            clean_share=0.3,
            compile="inductor" if plan.compile else None,
            seed=seed,
        ),
        text=text,
        # A digit is plain to see in one frame alone until σ is near 1: what all frames have in common, its motion and
        # its class, is decided there. Without the shift the frames of a clip came out unrelated to each other.
        path=RectifiedFlow(prediction="clean", base_tokens=4),
        fps=FPS,
    )


def evaluate(engine: Engine, plan: Plan) -> tuple[dict, list[Strip]]:
    """Sample and measure: what `metrics.json` says of the clips, and some of them to show."""
    source, detector = MovingDigits(seed=EVALUATION_SEED), DigitDetector()
    groups = {"seen": source.config.seen, "unseen": source.config.unseen}
    results, strips = {}, []
    with tqdm(total=sum(map(len, groups.values())) + len(CONTINUED), desc="sampling", unit=" packs") as bar:
        for name, shapes in groups.items():
            results[name], shown = _from_prompts(engine, detector, shapes, plan, bar)
            results[name]["ceiling"] = detector_ceiling(detector, source, shapes)
            strips += [replace(strip, caption=f"{name}: {strip.caption}") for strip in shown]
        for task in CONTINUED:
            results[task.name], shown = _continued(engine, source, task, plan)
            strips += [replace(strip, caption=f"{task.name}: {strip.caption}") for strip in shown]
            bar.update()
    return results, strips


@dataclass(frozen=True)
class Continued:
    """A task that starts from real frames: the first `given` of a clip of `shape`, taken from `scene_index` on."""

    name: str
    given: int
    shape: Shape
    scene_index: int


CONTINUED = (Continued("image to video", 1, (8, 24, 24), 1000), Continued("extension", 5, (13, 24, 24), 2000))


def _from_prompts(
    engine: Engine, detector: DigitDetector, shapes: Sequence[Shape], plan: Plan, bar: tqdm
) -> tuple[dict, list[Strip]]:
    """Every prompt at every shape: scores over all shapes and for each, and some clips to show."""
    captions, scores, strips, detections = prompts(), {}, [], []
    for shape in shapes:
        frames, *size = shape
        requests = [
            text_to_video(caption, frames, tuple(size), guidance=plan.guidance, seed=index)
            for index, caption in enumerate(captions)
        ]
        clips = engine.generate(requests, steps=plan.steps)
        seen = [detector(clip) for clip in clips]
        detections += seen
        scores["x".join(map(str, shape))] = prompt_scores(seen, captions)
        # Digits and directions that differ from shape to shape.
        strips += [Strip(captions[i], clips[i]) for i in range((9 * len(scores)) % 40, 40, 21)]
        bar.update()
    return prompt_scores(detections, captions * len(shapes)) | {"by_shape": scores}, strips


def _continued(engine: Engine, source: MovingDigits, task: Continued, plan: Plan) -> tuple[dict, list[Strip]]:
    """Real clips of digits never seen in this place, continued from their first frames."""
    captions = [prompts()[index % 40] for index in range(plan.continued)]
    scenes = [
        source.scene(task.scene_index + index, shape=task.shape, caption=caption)
        for index, caption in enumerate(captions)
    ]
    originals = [source.render(scene) for scene in scenes]
    requests = [_request(task, clip, scene, plan) for clip, scene in zip(originals, scenes, strict=True)]
    requests = [replace(request, seed=index) for index, request in enumerate(requests)]
    clips = engine.generate(requests, steps=plan.steps)
    result = next_position(source, scenes, clips, given=task.given)
    result["given_frames_identical"] = clean_frames_identical(clips, originals, head=task.given)
    shown = list(zip(captions, clips, strict=True))[:: max(1, len(clips) // 2)][:2]
    return result, [Strip(caption, clip, head=task.given) for caption, clip in shown]


def _request(task: Continued, original: Tensor, scene: Scene, plan: Plan) -> Request:
    given = original[:, : task.given]
    if task.given == 1:
        return image_to_video(given, scene.caption, task.shape[0], guidance=plan.guidance_given)
    return extend(given, scene.caption, task.shape[0] - task.given, guidance=plan.guidance_given)


def _draw(strips: Sequence[Strip], folder: Path) -> None:
    contact_sheet(strips, folder / "contact_sheet.png")
    (folder / "clips").mkdir(exist_ok=True)
    for index, strip in enumerate(strips):
        name = f"{index:02d}_{strip.caption.replace(':', '').replace(' ', '_')}"
        for suffix in CLIPS:
            write_media(folder / "clips" / (name + suffix), strip.video, fps=FPS, scale=SCALE)
    rows = read_log(folder / "run" / LOG)
    loss_curve(
        [row["loss"] for row in rows],
        folder / "loss.png",
        steps=[row["step"] for row in rows],
        seconds=[row["seconds"] for row in rows],
    )


def training_record(run: Path) -> dict:
    """What the run's log says: steps, time, speed and padding."""
    rows = read_log(run / LOG)
    useful, seconds = sum(row["useful"] for row in rows), rows[-1]["seconds"]
    return {
        "steps": rows[-1]["step"],
        "seconds": round(seconds, 1),
        "useful_tokens": useful,
        "useful_tokens_per_s": round(useful / seconds),
        "padding_share": sum(row["padding"] for row in rows) / len(rows),
        "final_loss": sum(row["loss"] for row in rows[-50:]) / len(rows[-50:]),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "torch": torch.__version__,
    }


def summary(results: dict) -> str:
    """A short table of `metrics.json`."""
    lines = ["", f"{'':22}{'right':>8}{'shuffled':>10}{'chance':>8}{'ceiling':>9}"]
    for group in ("seen", "unseen"):
        for what in ("digit", "direction"):
            score, ceiling = results[group][what], results[group]["ceiling"][what]["right"]
            numbers = (score["right"], score["shuffled"], score["chance"], ceiling)
            cells = "".join(f"{value:>{width}.1%}" for value, width in zip(numbers, (8, 10, 8, 9), strict=True))
            lines.append(f"{what + ', ' + group + ' shapes':22}{cells}")
    for task in CONTINUED:
        score = results[task.name]
        kept = "bit-identical" if score["given_frames_identical"] else "CHANGED"
        lines.append(
            f"{task.name}: next position off by {score['model']:.2f} pixels "
            f"({score['copy_last_frame']:.2f} if the last frame is copied); given frames {kept}"
        )
    return "\n".join(lines)


_MINUTES = number(float, "a positive number", lambda value: 0 < value < math.inf)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sora-fast demo", description=__doc__)
    add = parser.add_argument
    add("--out", type=path_argument, default=Path("runs/demo"), help="folder for everything (default: %(default)s)")
    add("--quick", action="store_true", help=f"train {QUICK.minutes:g} minute(s) only, to see that all of it works")
    add("--minutes", type=_MINUTES, help=f"train for so long (default: {FULL.minutes:g})")
    add("--seed", type=int, default=0, help="of weights and noise (default: %(default)s)")
    add("--resume", action="store_true", help="go on with a demo that was stopped")
    return parser
