"""A step of the sampling engine on one guided video: model, guidance and solver, as they are and as one CUDA graph."""

import math
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.entrants import Absent
from benchmarks.rows import Row, distances, start_afresh
from benchmarks.shapes import Grid
from benchmarks.steps.model import SMALL, XL
from benchmarks.steps.wholes import OURS, leave_out_the_wrong, made, need_gpu
from sora_fast import use_backend
from sora_fast.generation.engine import Engine
from sora_fast.generation.tasks import Request
from sora_fast.training.run import Networks, RunConfig, TextConfig, TrainConfig

OP = "sampler_step"
# Token grids of the video; the network sees as many tokens again without the prompt. They fill a graph's room.
_GRIDS: Mapping[str, Grid] = {"1k": (2, 16, 16), "8k": (8, 16, 32), "32k": (16, 32, 32)}
_TINY: Grid = (2, 4, 4)
# Of a call; the first ones are no replays yet, and are not timed.
_STEPS, _WARM = 10, 4
# Whether the step is one graph.
_VARIANTS: Mapping[str, bool] = {OURS: False, f"{OURS}, graph": True}


def cases(*, dry: bool) -> list[str]:
    """The names of the rows."""
    return ["small, one clip"] if dry else [f"DiT-XL, {size} tokens guided" for size in _GRIDS]


def step(device: torch.device, *, seconds: float, dry: bool) -> Callable[[str], list[dict[str, Any]]]:
    """Of a case's name: its row; the arguments are as of model.py's."""
    networks = _networks(dry=dry).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)

    def do(name: str) -> list[dict[str, Any]]:
        start_afresh()
        series, size = name.split(", ")
        grid = _GRIDS.get(size.split()[0], _TINY)
        row = Row(OP, name, "forward", tokens=2 * math.prod(grid), series=series)
        makers = {name: partial(_video, networks, grid, graph=graph) for name, graph in _VARIANTS.items()}
        with use_backend("triton"):
            videos = made(makers, row)
            if seconds:
                _judge(videos, networks, grid, row)
                row.rounds = _rounds(videos, seconds)
        return [asdict(row)]

    return do


def _networks(*, dry: bool) -> Networks:
    """All weights random, as in model.py; the prompt conditions by its pooled vector."""
    text = TextConfig(dim=64, layers=1)
    model = replace(SMALL if dry else XL, pooled_dim=text.width)
    networks = Networks(RunConfig(model=model, train=TrainConfig(steps=1), text=text))
    torch.manual_seed(0)
    for parameter in networks.model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return networks


class _Video:
    """One video, made again with every call, which gives its pixels and the milliseconds of each of its later steps."""

    def __init__(self, networks: Networks, grid: Grid, *, graph: bool) -> None:
        self.device = next(networks.parameters()).device
        if graph:
            need_gpu(self.device)
        self._engine = Engine(networks, device=self.device, compile=False, graph=graph)
        frames, height, width = (n * p for n, p in zip(grid, networks.patch_size, strict=True))
        self._request = Request("a prompt", frames, height, width, guidance=3.0)

    def __call__(self) -> tuple[Tensor, list[float]]:
        stamps: list[float] = []

        def stamp(done: int, steps: int) -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            stamps.append(time.perf_counter())

        (video,) = self._engine.generate([self._request], steps=_STEPS, progress=stamp)
        return video, [1e3 * (b - a) for a, b in pairwise(stamps[_WARM - 1 :])]


def _video(networks: Networks, grid: Grid, *, graph: bool) -> _Video:
    """That was made once: a graph is captured by then."""
    video = _Video(networks, grid, graph=graph)
    video()
    if graph and not video._engine.latency.replayed:
        raise Absent("the step could not be captured, as the log says")
    return video


def _judge(videos: dict[str, _Video], networks: Networks, grid: Grid, row: Row) -> None:
    """Beside PyTorch in fp64."""
    with use_backend("torch"):
        truth, plain = (_Video(n, grid, graph=False)()[0] for n in (deepcopy(networks).double(), networks))
    row.errors = {"torch": distances([plain], [truth])}
    row.errors |= {name: distances([video()[0]], [truth]) for name, video in videos.items()}
    leave_out_the_wrong(videos, row)


def _rounds(videos: Mapping[str, _Video], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of steps, of videos in turn, until so many seconds are over."""
    rounds: dict[str, list[float]] = {name: [] for name in videos}
    end = time.perf_counter() + seconds
    while not any(rounds.values()) or time.perf_counter() < end:
        for name, video in videos.items():
            rounds[name] += video()[1]
    return rounds
