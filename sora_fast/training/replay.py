"""The step that a run stopped at, kept in its folder, and run again to see where it breaks.

RUN/replay/worker-0/step-00000012/model.safetensors, pack-0.safetensors, …, state.json
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from sora_fast.diffusion.pixels import pixel_segments
from sora_fast.packing import RaggedLatents
from sora_fast.packing._bundle import TensorBundle
from sora_fast.training import checkpoint
from sora_fast.training.run import Networks, read_run
from sora_fast.training.step import NoisyPack, PackLoss

REPLAY = "replay"


@dataclass(frozen=True)
class Finding:
    """Of one pack of a worker's step: its loss, and where something is not finite first (None: nowhere)."""

    step: int
    worker: int
    pack: int
    loss: float
    where: str | None

    def __str__(self) -> str:
        where = "all is finite here" if self.where is None else f"not finite first in {self.where}"
        return f"step {self.step}, worker {self.worker}, pack {self.pack}: loss {self.loss:.4g}; {where}"


def save(folder: Path, rank: int, step: int, networks: Networks, packs: Sequence[NoisyPack]) -> Path:
    """Keep the packs of a worker's step, and the weights, in place of what was kept before; returns where."""
    flat = [_flattened(pack) for pack in packs]
    tensors = {"model": networks.trained()} | {f"pack-{number}": named for number, (named, _) in enumerate(flat)}
    state = {"static": [static for _, static in flat]}
    return checkpoint.save(folder / REPLAY / f"worker-{rank}", step, tensors, state, keep=1)


def replay(folder: Path, device: torch.device | str = "cpu") -> list[Finding]:
    """Run what `save` kept in a run's folder, forward and backward, eagerly. ValueError if nothing is kept there."""
    config = read_run(folder)
    if config.distilled is not None:
        raise ValueError(f"{folder}: a distilled run keeps the step that it breaks at, but cannot run it again")
    roots = sorted((folder / REPLAY).glob("worker-*"))
    if not roots:
        raise ValueError(f"{folder}: no step is kept there for a replay; a run keeps the one that it breaks at")
    networks = Networks(config).to(device)
    findings = []
    for root in roots:
        saved = checkpoint.latest(root)
        with torch.no_grad():
            for name, parameter in networks.trained().items():
                parameter.copy_(saved.tensors["model"][name])
        for number, static in enumerate(saved.state["static"]):
            pack = _rebuilt(NoisyPack, saved.tensors[f"pack-{number}"], static).to(device)
            loss, where = examine(PackLoss(networks, config.train.precision), pack)
            findings.append(Finding(saved.step, int(root.name.removeprefix("worker-")), number, loss, where))
    return findings


def examine(loss_of: PackLoss, pack: NoisyPack) -> tuple[float, str | None]:
    """The loss of a pack, and the first place, in the order of computation, that holds a value that is not finite.

    Looked at: the weights, the data, the modules' outputs, the loss, the gradients of the modules' outputs, those of
    the weights.
    """
    networks, found = loss_of.networks, []
    for name, parameter in networks.trained().items():
        _look(found, f"the weight {name}", parameter)
    _look_at_data(found, pack.latents)
    handles = [module.register_forward_hook(_watcher(found, name)) for name, module in networks.named_modules() if name]
    try:
        loss, _ = loss_of(pack)
        _look(found, "the loss", loss)
        loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in networks.trained().items():
        if parameter.grad is not None:
            _look(found, f"the gradient of {name}", parameter.grad)
    networks.zero_grad()
    return loss.item(), found[0] if found else None


def _watcher(found: list[str], name: str) -> Any:
    """A forward hook that looks at a module's output, and at its gradient when that comes."""

    def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        # What stands past the last video is unspecified.
        tensors = [x for x in _leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
        for tensor in tensors:
            _look(found, f"the output of {name}", tensor)
            if tensor.requires_grad:
                tensor.register_hook(lambda g: _look(found, f"the gradient of the output of {name}", g))

    return look


def _leaves(output: Any) -> list[Any]:
    if isinstance(output, tuple | list):
        return [leaf for item in output for leaf in _leaves(item)]
    if isinstance(output, RaggedLatents):
        return [torch.where(pixel_segments(output) < output.max_segments, output.flat, 0)]
    if isinstance(output, TensorBundle) or is_dataclass(output):
        return [leaf for field in fields(output) for leaf in _leaves(getattr(output, field.name))]
    return [output]


def _look_at_data(found: list[str], latents: RaggedLatents) -> None:
    segments = pixel_segments(latents)
    bad = segments[~latents.flat.isfinite() & (segments < latents.max_segments)].unique().tolist()
    if bad:
        found.append(f"the data: sample {', '.join(map(str, bad))} of the pack")


def _look(found: list[str], where: str, tensor: Tensor) -> None:
    if count := int((~tensor.isfinite()).sum()):
        found.append(f"{where} ({count:,} of {tensor.numel():,} numbers)")


def _flattened(bundle: TensorBundle, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and static values of a bundle, by the dotted names of their fields."""
    tensors: dict[str, Tensor] = {}
    static: dict[str, Any] = {}
    for field in fields(bundle):
        value, name = getattr(bundle, field.name), prefix + field.name
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, TensorBundle):
            inner = _flattened(value, f"{name}.")
            tensors |= inner[0]
            static |= inner[1]
        else:
            static[name] = value
    return tensors, static


def _rebuilt(cls: type, tensors: dict[str, Tensor], static: dict[str, Any], prefix: str = "") -> Any:
    """What `_flattened` took apart."""
    hints, values = get_type_hints(cls), {}
    for field in fields(cls):
        name = prefix + field.name
        if name in tensors or name in static:
            values[field.name] = tensors.get(name, static.get(name))
        else:
            inner = next(hint for hint in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(hint))
            values[field.name] = _rebuilt(inner, tensors, static, f"{name}.")
    return cls(**values)
