"""Optimisers, learning-rate schedule and the running average of weights."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sora_fast.training.muon import Muon

OPTIMIZERS = ("adamw", "muon")
DECAYS = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a share of its peak: a linear warm-up in steps, and a decay over the run's progress.

    Progress is what the run is limited by, steps or seconds, as a share of the whole: a run that is limited by
    time always ends decayed, however fast the machine is.
    """

    warmup: int
    decay: str = "cosine"

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {self.decay!r}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be a number of steps ≥ 0, got {self.warmup}")

    def __call__(self, step: int, progress: float) -> float:
        """The factor for step `step` (from 0) when `progress` (0 to 1) of the run is over."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        left = 1.0 - min(max(progress, 0.0), 1.0)
        if self.decay == "cosine":
            return warm * 0.5 * (1.0 - math.cos(math.pi * left))
        return warm * (left if self.decay == "linear" else 1.0)


def build_optimizers(
    parameters: Mapping[str, nn.Parameter],
    name: str,
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    muon_ratio: float = 1.0,
    capturable: bool | None = None,
) -> list[torch.optim.Optimizer]:
    """AdamW for everything; or Muon, at `muon_ratio` times `lr`, for the blocks' matrices and AdamW for the rest.

    parameters: by qualified name; a matrix below a module list `blocks` counts as hidden, which is what Muon is made
    for. Not so the modulation's, which starts at zero: its rows are scales and gates, with no orthogonality to gain.
    capturable: rates are tensors on the parameters' device, [] float32, which `set_lr` fills: a graph that holds the
    step then sees them change. None: on a GPU. On a CPU they are numbers, in double precision.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    trained = {key: p for key, p in parameters.items() if p.requires_grad}
    hidden = [p for key, p in trained.items() if name == "muon" and p.ndim == 2 and _is_hidden(key)]
    hidden_ids = {id(p) for p in hidden}
    rest = [p for p in trained.values() if id(p) not in hidden_ids]
    # Vectors (biases, norm weights) are not shrunk: decay is meant for matrices.
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay, "ratio": 1.0},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "ratio": 1.0},
    ]
    if capturable is None:
        capturable = any(p.is_cuda for p in trained.values())
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True, capturable=capturable)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if hidden:
        optimizers.append(Muon([{"params": hidden, "ratio": muon_ratio}], lr, weight_decay=weight_decay))
    if capturable:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                device = group["params"][0].device if group["params"] else "cpu"
                group["lr"] = torch.zeros((), dtype=torch.float32, device=device)
    set_lr(optimizers, lr)
    return optimizers


def _is_hidden(name: str) -> bool:
    return "blocks." in name and "adaLN" not in name


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set AdamW's rate, and Muon's in the proportion that `build_optimizers` was given."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * group["ratio"])
            else:
                group["lr"] = lr * group["ratio"]


@contextlib.contextmanager
def skip_where(optimizers: Sequence[torch.optim.Optimizer], bad: Tensor) -> Iterator[None]:
    """Inside, a step changes nothing, weights nor state, where `bad`, [] bool on their device, is true.

    By the attributes through which torch's GradScaler tells fused optimizers so, which Muon looks at too.
    """
    found = bad.float()
    for optimizer in optimizers:
        optimizer.grad_scale, optimizer.found_inf = None, found
    try:
        yield
    finally:
        for optimizer in optimizers:
            del optimizer.grad_scale, optimizer.found_inf


def optimizer_tensors(
    optimizers: list[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimisers' state as named tensors: "<parameter>/<quantity>"."""
    return {
        f"{name}/{quantity}": value
        for name, parameter in parameters.items()
        for optimizer in optimizers
        for quantity, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizers: list[torch.optim.Optimizer],
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `optimizer_tensors` gave, on each parameter's device."""
    owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for key, value in tensors.items():
        name, quantity = key.rsplit("/", 1)
        if name not in parameters:
            raise ValueError(f"the checkpoint has optimiser state for {name!r}, which this model lacks")
        parameter = parameters[name]
        owners[id(parameter)].state[parameter][quantity] = value.to(parameter.device)


class WeightAverage:
    """An exponential moving average of the weights, what one samples with.

    The decay grows with the number of updates, (1 + n) / (10 + n), up to `decay`: a short run is not held back
    by its first, random weights.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self._live = list(parameters.values())
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()}
        device = self._live[0].device if self._live else "cpu"
        self._weight = torch.zeros((), dtype=torch.float32, device=device)

    def set_step(self, step: int) -> None:
        """The next update follows optimiser step `step` (from 0)."""
        self._weight.fill_(1.0 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self, bad: Tensor | None = None) -> None:
        """Take in the weights as they are now; not where `bad`, [] bool, is true."""
        weight = self._weight if bad is None else (~bad).float() * self._weight
        averaged = list(self.tensors.values())
        # On a CPU, to the bit as with the number itself.
        torch._foreach_lerp_(averaged, self._live, [weight] * len(averaged))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.tensors.items():
            value.copy_(tensors[name])
