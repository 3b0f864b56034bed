"""A training step of a whole SoraDiT on a ragged pack, beside plain PyTorch on padded batches of the same videos.

All ways share weights, loss, clipping, AdamW and averaging; on a GPU they compute in bf16 under autocast.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.entrants import Absent
from benchmarks.peers.padded_dit import PaddedBatch, PaddedDiT, padded_batch
from benchmarks.rows import Row, distances, start_afresh
from benchmarks.shapes import PACKS
from benchmarks.steps.model import SMALL, XL
from benchmarks.steps.wholes import OURS, leave_out_the_wrong, made, need_gpu, notes
from benchmarks.timing import Work, time_variants
from sora_fast import use_backend
from sora_fast.graphs import CudaRecorder, Graph
from sora_fast.packing import PackedLayout, RaggedLatents
from sora_fast.training.compiling import compile_loss
from sora_fast.training.flops import FlopCount
from sora_fast.training.optim import WeightAverage, build_optimizers
from sora_fast.training.precision import computing
from sora_fast.training.recompute import recompute
from sora_fast.training.run import Networks, RunConfig, TrainConfig
from sora_fast.training.step import NoisyPack, PackLoss, StepPacks, WholeStep, take_gradients

OP = "training_step"
PEER = "PyTorch, padded, compiled"
_PACK, _TINY = "32k ragged", "tiny"
# Whose gradients are compared.
_JUDGED = ("model.x_embedder.proj.weight", "model.blocks.1.attn.qkv.weight", "model.final_layer.linear.weight")

Losses = Callable[[Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class _Setting:
    """What all ways share. padded: the videos of `pack`, in batches."""

    networks: Networks
    pack: NoisyPack
    padded: tuple[PaddedBatch, ...]
    precision: str

    @property
    def device(self) -> torch.device:
        return self.pack.noise.device


@dataclass(frozen=True, eq=False)
class _Way:
    """One way to take the same step: the loss and the pixels of each of its packs, and all of it with the update."""

    loss_of: Losses
    packs: Sequence[Any]
    work: Work


def cases(*, dry: bool) -> list[str]:
    """The names of the rows."""
    return [f"small, {_TINY}"] if dry else [f"DiT-XL, {_PACK}"]


def step(device: torch.device, *, seconds: float, dry: bool) -> Callable[[str], list[dict[str, Any]]]:
    """Of a case's name: its row; the arguments are as of model.py's."""

    def do(name: str) -> list[dict[str, Any]]:
        start_afresh()
        series, pack = name.split(", ")
        setting = _setting(SMALL if dry else XL, pack, device)
        row = Row(OP, name, "step", flops=_flops(setting), tokens=PACKS[pack].tokens, series=series)
        with use_backend("triton"):
            ways = made({title: partial(_tried, make, setting) for title, make in _WAYS.items()}, row)
            if seconds:
                _judge(ways, setting, row)
                works = {title: way.work for title, way in ways.items()}
                row.rounds = time_variants(works, device=device, seconds=seconds, asleep=False)
                row.notes = notes(works, row, device)
        return [asdict(row)]

    return do


def _setting(config: Any, name: str, device: torch.device) -> _Setting:
    config = replace(config, position="rope+sincos3d", rope_theta=100.0)  # all that the padded peer knows
    networks = Networks(RunConfig(model=config, train=TrainConfig(steps=1), text=None))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in networks.parameters():
            nn.init.normal_(parameter, std=0.02)
    grids = PACKS[name].grids
    shapes = [(config.in_channels, *(n * p for n, p in zip(grid, config.patch_size, strict=True))) for grid in grids]
    videos, noises = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    sigma = torch.rand(len(grids))
    layout = PackedLayout.from_grids(grids, order="tiled")
    clean = torch.zeros(layout.capacity, dtype=torch.bool)
    noise = RaggedLatents.from_list(noises).flat
    pack = NoisyPack(RaggedLatents.from_list(videos), layout, None, sigma, noise, clean)
    padded = tuple(
        padded_batch(networks.model, videos[some], noises[some], sigma[some])
        for some in _padded(list(map(math.prod, grids)))
    )
    precision = "bfloat16" if device.type == "cuda" else "float32"
    return _Setting(networks.to(device), pack.to(device), tuple(map(partial(_moved, device), padded)), precision)


def _padded(lengths: Sequence[int]) -> Iterator[slice]:
    """Which videos make a padded batch: in their order, as many as a budget of all tokens of the pack has room for."""
    begin = 0
    for end in range(1, len(lengths) + 1):
        longer = [*lengths[begin:end], *lengths[end : end + 1]]
        if end == len(lengths) or len(longer) * max(longer) > sum(lengths):
            yield slice(begin, end)
            begin = end


def _moved(device: torch.device, batch: PaddedBatch) -> PaddedBatch:
    return PaddedBatch(*(tensor if tensor is None else tensor.to(device) for tensor in batch.tensors))


def _flops(setting: _Setting) -> int:
    """Of the useful tokens, whatever a way computes beside."""
    layout = setting.pack.layout
    lengths, grids = layout.cu_seqlens.diff().tolist(), layout.grids.tolist()
    return FlopCount(setting.networks.model).segments(lengths, grids).step


def _tried(make: Callable[[_Setting], _Way], setting: _Setting) -> _Way:
    way = make(setting)
    way.work()
    return way


def _eager(setting: _Setting) -> _Way:
    return _packed(setting, PackLoss(setting.networks, setting.precision))


def _compiled(setting: _Setting) -> _Way:
    need_gpu(setting.device)
    return _packed(setting, _by_blocks(setting))


def _graph(setting: _Setting) -> _Way:
    need_gpu(setting.device)
    loss_of = _by_blocks(setting)
    graph = Graph(_whole(setting, loss_of), CudaRecorder(setting.device))
    packs = StepPacks((setting.pack,))
    for _ in range(3):
        graph(packs)
    if not graph.replays:
        raise Absent("the step could not be captured, as the log says")
    return _Way(loss_of, packs.packs, partial(graph, packs))


def _peer(setting: _Setting) -> _Way:
    """Blocks compiled, as ours are: one graph for each of a few shapes."""
    compile_it = setting.device.type == "cuda"
    module = PaddedDiT(setting.networks.model, setting.networks.path, compile_blocks=compile_it)

    def loss_of(batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        with computing(setting.precision, setting.device.type):
            real = batch.patches[..., 0].numel() if batch.real is None else batch.real.sum()
            return module(*batch.tensors), torch.as_tensor(real, device=setting.device) * batch.patches.shape[2]

    whole = _whole(setting, loss_of)
    return _Way(loss_of, setting.padded, lambda: whole(SimpleNamespace(packs=setting.padded)))


_WAYS: Mapping[str, Callable[[_Setting], _Way]] = {
    OURS: _eager,
    f"{OURS}, compiled": _compiled,
    f"{OURS}, compiled, graph": _graph,
    PEER: _peer,
}


def _packed(setting: _Setting, loss_of: PackLoss) -> _Way:
    packs = StepPacks((setting.pack,))
    return _Way(loss_of, packs.packs, partial(_whole(setting, loss_of), packs))


def _whole(setting: _Setting, loss_of: Losses) -> WholeStep:
    """Of a learning rate that leaves the weights about where they are."""
    parameters = setting.networks.trained()
    optimizers = build_optimizers(parameters, "adamw", lr=1e-9)
    return WholeStep(loss_of, parameters, optimizers, WeightAverage(parameters, 0.999), 1.0)


def _twin(setting: _Setting) -> Networks:
    """The same weights, to be changed in how they are run."""
    shared = [*setting.networks.parameters(), *setting.networks.buffers()]
    return deepcopy(setting.networks, {id(tensor): tensor for tensor in shared})


def _by_blocks(setting: _Setting) -> PackLoss:
    loss_of = PackLoss(_twin(setting), setting.precision)
    compile_loss(loss_of, loss_of.networks.model.blocks, backend="inductor", scope="blocks", device=setting.device)
    return loss_of


def _judge(ways: dict[str, _Way], setting: _Setting, row: Row) -> None:
    """By gradients, beside PyTorch in fp32, which computes the blocks again to fit into memory."""
    references = []
    with use_backend("torch"):
        for precision in ("float32", setting.precision):
            networks = _twin(setting)
            recompute(networks.model.blocks, "block")
            references.append(_gradients(PackLoss(networks, precision), [setting.pack], setting))
    truth, plain = references
    row.errors = {"torch": distances(plain, truth)}
    row.errors |= {title: distances(_gradients(way.loss_of, way.packs, setting), truth) for title, way in ways.items()}
    leave_out_the_wrong(ways, row)


def _gradients(loss_of: Losses, packs: Sequence[Any], setting: _Setting) -> list[Tensor]:
    parameters = setting.networks.trained()
    take_gradients(loss_of, packs, list(parameters.values()))
    found = [parameters[name].grad.clone() for name in _JUDGED]
    setting.networks.zero_grad()
    return found
