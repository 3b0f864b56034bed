"""What a user's own few clips become: trained on with the defaults of `sora-fast train`, sampled by their captions.

python -m benchmarks.own_clips FOLDER --minutes 8 --out results/own_clips.json

Every caption is sampled at the size of every clip, with the defaults of `sora-fast sample`, and held to the clips of
that size, brought to one size where they differ: PSNR in dB (peak to peak 2). A caption is right if its own clip is the
nearest. Clips of 16 frames or fewer: of longer ones training takes any part.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_fast import cli
from sora_fast.generation.asking import requested
from sora_fast.generation.engine import Engine
from sora_fast.generation.options import SampleOptions
from sora_fast.training.data.sources import FolderSource
from sora_fast.training.run import LOG, read_run
from sora_fast.training.runlog import read_log


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        if code := cli.main(["train", "--data", str(a.folder), "--out", str(run), "--minutes", str(a.minutes)]):
            return code
        found = judge(run)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


def judge(run: Path) -> dict:
    """Of a run that is at its end."""
    config, rows = read_run(run), read_log(run / LOG)
    source, engine = FolderSource(config.data), Engine.load(run)
    clips = [source[place].video for place in range(len(source))]
    asked = SampleOptions(run, run / "clip.mp4")
    requests = [
        requested(replace(asked, prompt=caption, frames=clip.shape[1], size=tuple(clip.shape[2:])), config)[0]
        for caption, clip in zip(source.captions, clips, strict=True)
    ]
    made = engine.generate(requests)
    decibels = [[psnr(clip, other) for other in clips] for clip in made]
    return {
        "clips": [f"{path.name} {tuple(clip.shape)}" for path, clip in zip(source.files, clips, strict=True)],
        "captions": source.captions,
        "psnr_of_each_caption_to_each_clip": decibels,
        "nearest_is_its_own": sum(row.index(max(row)) == place for place, row in enumerate(decibels)),
        "psnr_to_its_own": [row[place] for place, row in enumerate(decibels)],
        "guidance": requests[0].guidance,
        "training": {
            "steps": rows[-1]["step"],
            "seconds": rows[-1]["seconds"],
            "loss": sum(row["loss"] for row in rows[-50:]) / len(rows[-50:]),
            "useful_tokens_per_s": sum(row["useful"] for row in rows) / rows[-1]["seconds"],
            "parameters": sum(p.numel() for p in engine.networks.parameters()),
            "precision": config.train.precision,
        },
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "torch": torch.__version__,
    }


def psnr(made: Tensor, clip: Tensor) -> float:
    """In dB, of videos (C, T, H, W) in [-1, 1], the clip brought to the size of what was made."""
    if made.shape != clip.shape:
        clip = F.interpolate(clip[None], size=made.shape[1:], mode="trilinear")[0]
    return round(10 * torch.log10(4 / (made - clip).square().mean()).item(), 2)


if __name__ == "__main__":
    raise SystemExit(main())
