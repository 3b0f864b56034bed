"""The sampling engine beside the sampler before it, on a trained run: `python -m benchmarks.sampler RUN --out FILE`.

All variants take turns in one process, at equal steps and guidance. RUN: the folder of a run such as `make demo` trains
(runs/demo/run). Seconds are of whole calls, text, packing and decoding included, after compilation.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import sampler as before
from benchmarks.timing import Timing, keep_freed_memory, time_variants
from sora_fast.demo.detector import DigitDetector
from sora_fast.demo.digits import DigitsConfig, Shape, read_caption
from sora_fast.demo.metrics import prompts
from sora_fast.generation.engine import Engine
from sora_fast.generation.tasks import Request, text_to_video

STEPS, GUIDANCE, CACHED_STEPS = 16, 4.0, 30
# With the scale of guidance inside. The demo's directions are decided above 0.8, its digits below.
INTERVALS = [(0.0, 0.8, 4.0), (0.0, 0.85, 4.0), (0.0, 0.85, 6.0), (0.0, 0.9, 4.0), (0.2, 0.95, 4.0), (0.3, 1, 4.0)]
# Of all prompts at every shape, with other noise each time: of 160 clips alone a point is less than a standard error.
ROUNDS = 3
CACHES = [0.05, 0.1, 0.2]
SINGLE = (8, 20, 20)
# What the demo's model is trained on and asked for: stills, clips, and one longer than any that it saw; 9 to 216
# tokens, of which padding to the longest would make 62% in vain.
MIXED = [(1, 20, 20), (1, 28, 20), (1, 32, 32), (8, 20, 20), (16, 16, 24), (6, 32, 32), (12, 28, 20), (24, 20, 24)]


def requests(shapes: Sequence[Shape]) -> list[Request]:
    """One of each shape."""
    captions = prompts()
    return [
        text_to_video(captions[(7 * i) % len(captions)], frames, tuple(size), guidance=GUIDANCE, seed=i)
        for i, (frames, *size) in enumerate(shapes)
    ]


def speed(run: Path, seconds: float) -> dict[str, Any]:
    """Median seconds of every variant, and the ratios that they are for."""
    eager, engine = Engine.load(run, compile=False), Engine.load(run, compile=True)
    single, mixed = requests([SINGLE]), requests(MIXED)
    largest = max(MIXED, key=math.prod)
    # What a padded batch computes at least: all videos as long as the longest, without the cost of a mask.
    padded = requests([largest] * len(MIXED))
    began = time.perf_counter()
    engine.generate(single, steps=STEPS)
    start_up = time.perf_counter() - began
    variants = {
        "single": lambda: engine.generate(single, steps=STEPS),
        "single, not compiled": lambda: eager.generate(single, steps=STEPS),
        "single, before": lambda: before.generate(eager, single, steps=STEPS),
        "mixed": lambda: engine.generate(mixed, steps=STEPS),
        "mixed, not compiled": lambda: eager.generate(mixed, steps=STEPS),
        "mixed, before": lambda: before.generate(eager, mixed, steps=STEPS),
        "mixed, one at a time": lambda: [engine.generate([one], steps=STEPS) for one in mixed],
        "mixed, padded": lambda: engine.generate(padded, steps=STEPS),
    }
    rounds = time_variants(variants, device=torch.device("cpu"), seconds=seconds, warmup=1)
    times = {name: Timing.of(samples).median / 1e3 for name, samples in rounds.items()}
    engine.generate(single, steps=STEPS)
    return {
        "steps": STEPS,
        "shapes": {"single": SINGLE, "mixed": MIXED},
        "seconds": times,
        "rounds": len(rounds["single"]),
        "start_up_seconds": start_up,
        "share_outside_the_network": engine.latency.outside,
        "ratios": {
            "single": times["single, before"] / times["single"],
            "single, not compiled": times["single, before"] / times["single, not compiled"],
            "mixed": times["mixed, before"] / times["mixed"],
            "mixed, not compiled": times["mixed, before"] / times["mixed, not compiled"],
            "packed against one at a time": times["mixed, one at a time"] / times["mixed"],
            "packed against padded": times["mixed, padded"] / times["mixed"],
        },
    }


def guidance(run: Path, shapes: Sequence[Shape]) -> dict[str, Any]:
    """Guidance at some noise levels only, beside guidance at all: what it saves and what it costs; see `_judged`."""
    engine, detector = Engine.load(run, compile=True), DigitDetector()
    judge = partial(_judged, engine, detector, shapes, rounds=ROUNDS)
    rows = {"at all levels": judge()} | {
        f"{low:g} to {high:g}, scale {scale:g}": judge(interval=(low, high), guidance=scale)
        for low, high, scale in INTERVALS
    }
    right = {name: row.pop("right") for name, row in rows.items()}
    whole = rows["at all levels"]["evaluated_tokens"]
    for name, row in rows.items():
        row["tokens_saved"] = 1 - row["evaluated_tokens"] / whole
        row["against_all_levels"] = {
            what: _difference(right[name][what], right["at all levels"][what]) for what in ("digit", "direction")
        }
    return {"steps": STEPS, "shapes": shapes, "rows": rows}


def _difference(right: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Of the shares that came out right of the same noise, and its standard error."""
    change = right.astype(float) - other
    return {"change": change.mean(), "standard_error": change.std(ddof=1) / math.sqrt(len(change))}


def cache(run: Path, shapes: Sequence[Shape]) -> dict[str, Any]:
    """The first-block cache at several thresholds, beside none; see `_judged`."""
    engine, detector = Engine.load(run, compile=True), DigitDetector()
    rows = {"none": _judged(engine, detector, shapes, steps=CACHED_STEPS)}
    for threshold in CACHES:
        rows[f"{threshold}"] = _judged(engine, detector, shapes, steps=CACHED_STEPS, cache=threshold)
    for row in rows.values():
        del row["right"]
    return {"steps": CACHED_STEPS, "shapes": shapes, "rows": rows}


def _judged(
    engine: Engine,
    detector: DigitDetector,
    shapes: Sequence[Shape],
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    guidance: float = GUIDANCE,
    steps: int = STEPS,
    cache: float = 0.0,
    rounds: int = 1,
) -> dict[str, Any]:
    """Digits and directions as a detector reads them, and motion, the mean absolute change from frame to frame; all
    prompts at every shape in every round, the same seeds for every row. "right": bool, of each clip."""
    captions, seen, tokens, skipped, calls, seconds, motion = prompts(), [], 0, 0, 0, 0.0, []
    for turn, (frames, *size) in product(range(rounds), shapes):
        asked = [
            replace(
                text_to_video(caption, frames, tuple(size), guidance=guidance, seed=1000 * turn + i),
                guidance_interval=interval,
            )
            for i, caption in enumerate(captions)
        ]
        videos = engine.generate(asked, steps=steps, cache=cache)
        seen += [detector(video) for video in videos]
        motion += [video.diff(dim=1).abs().mean().item() for video in videos]
        latency = engine.latency
        tokens, skipped, calls = tokens + latency.tokens, skipped + latency.skipped, calls + latency.calls
        seconds += sum(latency.steps)
    subjects = [read_caption(caption)[0] for caption in captions] * (rounds * len(shapes))
    pairs = np.array(
        [(one.digit == digit, one.direction == way) for one, (digit, way) in zip(seen, subjects, strict=True)]
    )
    digit, direction = pairs.mean(axis=0)
    print(interval, guidance, steps, cache, digit, direction, skipped, calls, flush=True)
    return {
        "digit": digit,
        "direction": direction,
        "right": {"digit": pairs[:, 0], "direction": pairs[:, 1]},
        "motion": sum(motion) / len(motion),
        "clips": len(seen),
        "evaluated_tokens": tokens,
        "skipped_calls": skipped,
        "calls": calls,
        "seconds_of_steps": seconds,
    }


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="for the timings")
    parser.add_argument("--part", choices=("speed", "guidance", "cache"), help="this one only, added to FILE")
    arguments = parser.parse_args()
    keep_freed_memory()
    config = DigitsConfig()
    shapes = (*config.seen, *config.unseen)[::2]
    parts = {
        "speed": lambda: speed(arguments.run, arguments.seconds),
        "guidance": lambda: guidance(arguments.run, shapes),
        "cache": lambda: cache(arguments.run, shapes),
    }
    record = json.loads(arguments.out.read_text()) if arguments.part and arguments.out.exists() else {}
    record |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "guidance_scale": GUIDANCE}
    record |= {name: make() for name, make in parts.items() if arguments.part in (None, name)}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
