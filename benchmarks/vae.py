"""A CausalVideoVAE on the demo's digits: `python -m benchmarks.vae RUN --minutes 15 --out FILE`, one core or more.

It learns from clips of one half of the scans; the other half is encoded and decoded, at shapes that it saw parts of
and at others, beside a PCA of blocks of 4×4×4 pixels into as many numbers. PSNR is of the mean square over all clips,
of a range of 2. The second witness is the detector: what it says of what comes back, and of what went in. (Fitted
on the scans of that half, so that the other is shown, too.) Without --minutes RUN is only
measured; with --large, what an image of 2048×2048 takes is added to FILE.
"""

import argparse
import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_fast.demo.detector import DigitDetector
from sora_fast.demo.digits import MovingDigits
from sora_fast.demo.metrics import prompt_scores, prompts
from sora_fast.demo.run import EVALUATION_SEED
from sora_fast.models.codecs.padding import Padded
from sora_fast.models.codecs.vae import VAECodec
from sora_fast.models.video_vae import CausalVideoVAE, VAEConfig
from sora_fast.training.data.crops import CropConfig
from sora_fast.training.run import LOG
from sora_fast.training.runlog import read_log
from sora_fast.training.vae import VAETrainer
from sora_fast.training.vae_beginning import train_config
from sora_fast.training.vae_run import VAERunConfig, load_vae

CROPS = CropConfig(stride=4, max_frames=17, max_side=48, min_side=16)
# As many latents as the largest part has; of the mean one, 25 times as many.
CAPACITY = 720
# Clips that the PCA is fitted on.
FITTED = 400
LARGE = 2048

Back = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--large", action="store_true", help="only add to FILE what a large image takes, in RGB")
    arguments = parser.parse_args()
    if arguments.large:
        results = json.loads(arguments.out.read_text()) | {f"image of {LARGE}x{LARGE}": of_large_image()}
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        return
    if arguments.minutes is not None:
        train = train_config(CROPS, capacity=CAPACITY, minutes=arguments.minutes)
        config = VAERunConfig(VAEConfig(video_channels=1), train, crops=CROPS)
        VAETrainer(config, MovingDigits(seed=0), arguments.run).fit()
    results = {"training": training_record(arguments.run), **measured(load_vae(arguments.run))}
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def of_large_image() -> dict[str, float]:
    """Of random weights and values, there and back. peak: of the whole process, with all that it has loaded."""
    codec, image = VAECodec(CausalVideoVAE(VAEConfig())), torch.rand(3, 1, LARGE, LARGE) * 2 - 1
    before = _peak()
    began = time.monotonic()
    latents = codec.encode(image)
    encoded = time.monotonic()
    if not codec.decode(latents).isfinite().all():
        raise ValueError("the image does not come back finite")
    return {
        "GiB before": before,
        "GiB at the peak": _peak(),
        "seconds to encode": round(encoded - began, 1),
        "seconds to decode": round(time.monotonic() - encoded, 1),
        "threads": torch.get_num_threads(),
    }


def _peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)  # of KiB, on Linux


def training_record(run: Path) -> dict[str, Any]:
    """Of the log. seconds: of training, beside whatever else the machine did."""
    rows = read_log(run / LOG)
    return {
        "weights": sum(p.numel() for p in load_vae(run).network.parameters()),
        "steps": rows[-1]["step"],
        "seconds": round(rows[-1]["seconds"], 1),
        "latents": sum(row["useful"] for row in rows),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def measured(codec: VAECodec) -> dict[str, Any]:
    """Both halves, through the network, through it in bfloat16, and through a PCA."""
    detector, pca = DigitDetector(), fitted_pca(codec.spec.channels)
    low = VAECodec(_bfloat16(codec), mean=codec.spec.mean, std=codec.spec.std)
    ways = {"vae": _through(codec), "vae, bfloat16": _through(low), "pca": pca, "as they are": lambda clip: clip}
    results: dict[str, Any] = {}
    for half, name in (("detector", "held-out scans"), ("model", "scans trained on")):
        source = MovingDigits(seed=EVALUATION_SEED, half=half)
        for group in ("seen", "unseen"):
            shapes = getattr(source.config, group)
            captions = prompts() * len(shapes)
            clips = [
                source.render(source.scene(index, shape=shapes[index // len(prompts())], caption=caption))
                for index, caption in enumerate(captions)
            ]
            results[f"{name}, {group} shapes"] = {
                way: of_clips(clips, [back(clip) for clip in clips], captions, detector) for way, back in ways.items()
            }
    return results


def of_clips(
    clips: Sequence[Tensor], made: Sequence[Tensor], captions: Sequence[str], detector: DigitDetector
) -> dict[str, Any]:
    """PSNR of all frames, of first and of other ones; and what the detector finds."""
    squares = [(a - b).square().mean(dim=(0, 2, 3)) for a, b in zip(clips, made, strict=True)]
    scores = prompt_scores([detector(clip) for clip in made], captions)
    return {
        "psnr": _psnr(torch.cat(squares)),
        "psnr of first frames": _psnr(torch.cat([square[:1] for square in squares])),
        "psnr of other frames": _psnr(torch.cat([square[1:] for square in squares])),
        "finite": all(bool(clip.isfinite().all()) for clip in made),
        **{what: {key: scores[what][key] for key in ("right", "interval")} for what in ("digit", "direction")},
    }


def fitted_pca(numbers: int) -> Back:
    """Blocks of 4×4×4 pixels into so many numbers and back, the first frame behind three copies: as the network has it.
    Fitted on clips of the half that the network learns from."""
    source = MovingDigits(seed=0)
    blocks = torch.cat([_blocks(source[index].video)[0] for index in range(FITTED)])
    mean = blocks.mean(0)
    axes = torch.linalg.svd(blocks - mean, full_matrices=False).Vh[:numbers]

    def back(clip: Tensor) -> Tensor:
        of_clip, shape = _blocks(clip)
        made = ((of_clip - mean) @ axes.T @ axes + mean).view(*shape, 4, 4, 4)
        whole = made.permute(0, 3, 1, 4, 2, 5).reshape(1, 4 * shape[0], 4 * shape[1], 4 * shape[2])
        return whole[:, 3 : 3 + clip.shape[1], : clip.shape[2], : clip.shape[3]].clamp(-1, 1)

    return back


def _blocks(clip: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    times = 1 + math.ceil((clip.shape[1] - 1) / 4)
    frames = Padded.to_strides(clip, 4).frames(-3, 4 * times - 3)[0]
    blocks = frames.unfold(0, 4, 4).unfold(1, 4, 4).unfold(2, 4, 4)
    return blocks.reshape(-1, 64), tuple(blocks.shape[:3])


def _through(codec: VAECodec) -> Back:
    return lambda clip: codec.decode(codec.encode(clip), tuple(clip.shape[1:]))


def _bfloat16(codec: VAECodec) -> Any:
    network = type(codec.network)(codec.network.config)
    network.load_state_dict(codec.network.state_dict())
    return network.bfloat16()


def _psnr(squares: Tensor) -> float:
    mean = squares.mean().item()
    return round(10 * math.log10(4 / mean), 2) if mean else math.inf


if __name__ == "__main__":
    main()
