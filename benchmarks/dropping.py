"""What token dropping gives the demo in equal time: `python -m benchmarks.dropping FOLDER --out FILE --minutes 8`.

A run for each rule of `--drop`, and one without, one after the other, on one worker; FOLDER gets them. Each says how
many tokens, and whole samples, a second it trained on, and how often the demo's detector is right.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.precision import scores
from benchmarks.timing import keep_freed_memory
from sora_fast.demo.digits import DigitsConfig, MovingDigits
from sora_fast.demo.run import FULL, run_config
from sora_fast.generation.engine import Engine
from sora_fast.packing.dropping import BetaDrop, ConstantDrop
from sora_fast.training.dropping import BETA_MOST
from sora_fast.training.run import LOG
from sora_fast.training.runlog import read_log
from sora_fast.training.trainer import Trainer

# By name: the rule, and the share of the tokens that it drops in the mean.
RULES = {
    "none": (None, 0.0),
    "0.5": (ConstantDrop(0.5), 0.5),
    "beta:0.5": (BetaDrop(0.5, max_rate=BETA_MOST), 0.5),
}


def trained(folder: Path, rule: ConstantDrop | BetaDrop | None, dropped: float, minutes: float) -> dict[str, Any]:
    """How far it came, without the first ten steps, which compile."""
    config = run_config(FULL)
    batch = replace(config.train.batch, drop=rule)
    config = replace(config, train=replace(config.train, minutes=minutes, batch=batch))
    Trainer(config, MovingDigits(seed=0), folder).fit()
    first, *_, last = rows = read_log(folder / LOG)[9:]
    tokens = sum(row["useful"] for row in rows[1:]) / (last["seconds"] - first["seconds"])
    return {"steps": last["step"], "useful_tokens_per_second": tokens, "of_whole_samples": tokens / (1 - dropped)}


def main() -> None:
    """Write the record, after every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    arguments = parser.parse_args()
    keep_freed_memory()
    config = DigitsConfig()
    groups = {"seen": config.seen, "unseen": config.unseen}
    record: dict[str, Any] = {
        "command": f"python -m benchmarks.dropping FOLDER --out FILE --minutes {arguments.minutes:g}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "minutes_of_training": arguments.minutes,
        "runs": {},
    }
    for name in arguments.rules:
        run = arguments.folder / name.replace(":", "-")
        made = trained(run, *RULES[name], arguments.minutes)
        record["runs"][name] = made | {"scores": scores(Engine.load(run), groups)}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
