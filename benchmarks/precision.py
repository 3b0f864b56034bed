"""The demo trained in float32, twice, and in bfloat16: `python -m benchmarks.precision FOLDER --out FILE --steps 300`.

Whether bfloat16 costs quality is a matter of what two seeds of float32 differ by. All runs take so many steps, on one
worker; FOLDER gets a run of each. Scores say something from a thousand steps or so on. With `--sampled RUN` nothing
is trained: a run in float32 is sampled in both precisions, and that is added to FILE.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.timing import keep_freed_memory
from sora_fast.demo.detector import DigitDetector
from sora_fast.demo.digits import DigitsConfig, MovingDigits
from sora_fast.demo.run import FULL, _from_prompts, run_config
from sora_fast.generation.engine import Engine
from sora_fast.training.precision import fitting_precision
from sora_fast.training.run import LOG
from sora_fast.training.runlog import read_log
from sora_fast.training.trainer import Trainer

VARIANTS = {
    "float32": {"precision": "float32", "seed": 0},
    "bfloat16": {"precision": "bfloat16", "seed": 0},
    "float32, another seed": {"precision": "float32", "seed": 1},
}
# Of which the loss is the mean: single steps differ by what was drawn for them.
STRETCH = 50


def trained(folder: Path, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """The loss by stretches, and the seconds of a step without the first ones, which compile."""
    config = run_config(FULL)
    config = replace(config, train=replace(config.train, minutes=None, steps=steps, **options))
    Trainer(config, MovingDigits(seed=0), folder).fit()
    rows = read_log(folder / LOG)
    losses = [row["loss"] for row in rows]
    moments = sorted({row["seconds"] for row in rows})
    return {
        "loss": [statistics.fmean(losses[i : i + STRETCH]) for i in range(0, steps, STRETCH)],
        "seconds_a_step": statistics.median(b - a for a, b in pairwise(moments)) / config.train.log_every,
    }


def scores(engine: Engine, groups: dict[str, Sequence[tuple[int, int, int]]]) -> dict[str, Any]:
    """As the demo takes them; sampling computes in the precision that the run was trained in."""
    detector = DigitDetector()
    with tqdm(disable=True) as bar:
        made = {name: _from_prompts(engine, detector, shapes, FULL, bar)[0] for name, shapes in groups.items()}
    return {
        name: {what: {key: one[what][key] for key in ("right", "interval")} for what in ("digit", "direction")}
        for name, one in made.items()
    }


def sampled(run: Path, groups: dict[str, Sequence[tuple[int, int, int]]]) -> dict[str, Any]:
    """The scores of one run in both precisions, of the same noise."""
    made = {}
    for precision in ("float32", "bfloat16"):
        engine = Engine.load(run)
        config = engine.networks.config
        engine.networks.config = replace(config, train=replace(config.train, precision=precision))
        made[precision] = scores(engine, groups)
    return made


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sampled", type=Path, metavar="RUN")
    arguments = parser.parse_args()
    keep_freed_memory()
    config = DigitsConfig()
    groups = {"seen": config.seen, "unseen": config.unseen}
    if arguments.sampled is not None:
        record = json.loads(arguments.out.read_text()) | {"sampled": sampled(arguments.sampled, groups)}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        return
    record: dict[str, Any] = {
        "command": f"python -m benchmarks.precision FOLDER --out FILE --steps {arguments.steps}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "products_faster_in_bfloat16": fitting_precision(torch.device("cpu"))[1],
        "steps": arguments.steps,
        "loss_is_the_mean_of_steps": STRETCH,
        "runs": {},
    }
    for name, options in VARIANTS.items():
        run = arguments.folder / name.replace(", ", "-").replace(" ", "-")
        record["runs"][name] = trained(run, arguments.steps, options) | {"scores": scores(Engine.load(run), groups)}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
