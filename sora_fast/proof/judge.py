"""Runs a trial on the kernels, and holds them to the error rule."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sora_fast.proof.calls import Call
from sora_fast.proof.cases import Trial
from sora_fast.proof.rule import error_and_limit, poisoned_scratch

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Measured:
    """How far an output or a gradient is from the fp64 truth, and how far it may be."""

    name: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit  # not so for NaN

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.2e}, allowed {self.limit:.2e}"


def judge(trial: Trial, backend: str = "triton") -> list[Measured]:
    """Every output and gradient of the kernels, beside PyTorch's in the same dtype and in fp64, both on the CPU.

    Raises what the kernels raise, and ValueError if a result has another dtype or shape.
    """
    with poisoned_scratch():
        ours = results(trial.call.on(backend), trial)
    plain_call = trial.call.to(torch.device("cpu")).on("torch")
    plain, truth = results(plain_call, trial), results(plain_call.exact(), trial)
    measured = []
    for name, result in ours.items():
        try:
            measured.append(Measured(name, *error_and_limit(result, plain[name], truth[name], terms=trial.terms)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return measured


def results(call: Call, trial: Trial) -> dict[str, Tensor]:
    """The outputs and gradients of a trial's call, or of the same one elsewhere, on the CPU by their names."""
    outputs = call.forward()
    gradients: Tensors = ()
    if call.inputs:
        gradients = call.backward(outputs, tuple(_upstream(output, trial.idle) for output in outputs))
    names = [*(f"output {i}" for i in range(len(outputs))), *(f"gradient {i}" for i in range(len(gradients)))]
    return dict(zip(names, (x.detach().cpu() for x in (*outputs, *gradients)), strict=True))


def _upstream(output: Tensor, idle: Tensor | None) -> Tensor:
    """Its gradient: the same numbers on every device and exact in every dtype; NaN where it is `idle`."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randint(-2, 3, output.shape, generator=generator).to(output)
    if idle is None:
        return gradient
    return gradient.masked_fill(idle.to(output.device).view(-1, *[1] * (output.ndim - 1)), float("nan"))
