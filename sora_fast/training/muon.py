"""Muon: momentum whose steps are made orthogonal (https://kellerjordan.github.io/posts/muon)."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sora_fast.training.distributed import World

# A quintic whose repeated application sends every singular value of a matrix near 1 (same source).
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon for matrices, with the updates scaled to the size of AdamW's (arXiv 2502.16982), so that one lr serves both.

    torch.optim.Muon does the same, one matrix at a time and always in bfloat16, which a CPU has to emulate: 0.22 s a
    step for 4 blocks of width 128 on one core, as long as the step itself. This one orthogonalises matrices of equal
    shape together in float32, in 0.02 s; several workers share the work (arXiv 2502.16982, Sec. 2.3).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            if wrong := [tuple(p.shape) for p in group["params"] if p.ndim != 2]:
                raise ValueError(f"parameters: shapes {wrong}; Muon takes matrices only")

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient; where `optim.skip_where` says so, change nothing."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for parameters in alike.values():
                self._update(parameters, group["lr"], group["weight_decay"], group["momentum"])

    def _update(
        self, parameters: Sequence[nn.Parameter], lr: float | Tensor, weight_decay: float, momentum: float
    ) -> None:
        buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
        gradients, shrink = [p.grad for p in parameters], 1 - lr * weight_decay
        if (found := getattr(self, "found_inf", None)) is not None:
            # Gradients that are the momentum leave it as it is.
            bad = found > 0
            gradients = [torch.where(bad, b, g) for b, g in zip(buffers, gradients, strict=True)]
            shrink = torch.where(bad, torch.ones_like(found), shrink)
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        looking_ahead = torch._foreach_lerp(gradients, buffers, momentum)
        directions = _shared(World.current(), torch.stack(looking_ahead)).to(gradients[0].dtype)
        if found is not None:
            directions = torch.where(bad, 0.0, directions)
        torch._foreach_mul_(parameters, shrink)
        # An orthogonal matrix has entries of size 1/√max(shape); AdamW's updates have about 0.2.
        size = 0.2 * max(parameters[0].shape) ** 0.5
        if isinstance(lr, Tensor):  # which nobody reads: a graph may hold this
            torch._foreach_sub_(parameters, list((directions * (lr * size)).unbind()))
        else:
            torch._foreach_add_(parameters, list(directions.unbind()), alpha=-lr * size)


def _shared(world: World, matrices: Tensor) -> Tensor:
    """`orthogonal`, each worker doing its share where the matrices can be shared out evenly; the same bits on all."""
    share, rest = divmod(len(matrices), world.size)
    if rest:
        return orthogonal(matrices)
    return world.gather(orthogonal(matrices[world.rank * share : (world.rank + 1) * share]))


def orthogonal(matrices: Tensor) -> Tensor:
    """[B, n, m] → the same with singular values near 1 (0.7 to 1.2, if they were not tiny), by Newton–Schulz steps.

    X ← (A + B·XXᵀ + C·(XXᵀ)²) X. All these polynomials of one Gram matrix commute, so they are gathered in its own
    small size, and X is multiplied once, not at every step: for X of 128 × 512 that is 0.6 of the work. In float32: the
    Gram matrix squares the singular values, and in bfloat16 the small ones would drown.
    """
    x = matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram, product = x @ x.mT, None
    for step in range(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=1, dim2=2).add_(A)
        product = factor if product is None else factor @ product
        if step < STEPS - 1:
            gram = factor @ gram @ factor
    x = product @ x
    return x.mT if tall else x
