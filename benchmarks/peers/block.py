"""DiT's block as its authors wrote it, on a packed batch: attention segment by segment."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.entrants import Entrant
from benchmarks.peers.compiling import compiled as compile_peer


def eager(case: Case, compete: Callable[..., Entrant] = Entrant.peer) -> Entrant:
    """It is given h, the norm in front of it, and makes that of the next block, as the packed one does."""
    block, shared = case.options["block"], case.options["shared"]
    segments, lengths = shared.layout.segment_ids.long(), shared.layout.cu_seqlens.diff().tolist()
    cos, sin = _turns(case)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*(x[None] for x in p))[0] for p in parts], dim=1)

    def run(x: Tensor, h: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        gate, shift_mlp, scale_mlp, gate_mlp, shift, scale = (table[segments] for table in tensors[:6])
        p = dict(zip(case.options["names"], tensors[6:], strict=True))
        q, k, v = _linear(h, p, "attn.qkv").unflatten(1, (3, block.attn.heads, -1)).unbind(1)
        q, k = (rotate(F.rms_norm(y, y.shape[2:], p[f"attn.{n}_norm"], 1e-6)) for n, y in (("q", q), ("k", k)))
        x = x + gate * _linear(attend(q, k, v).transpose(0, 1).flatten(1), p, "attn.proj")
        hidden = F.gelu(_linear(_norm(x) * (1 + scale_mlp) + shift_mlp, p, "mlp.fc1"), approximate="tanh")
        x = x + gate_mlp * _linear(hidden, p, "mlp.fc2")
        return x, _norm(x) * (1 + scale) + shift

    return compete(case, run)


def compiled(case: Case) -> Entrant:
    return eager(case, compile_peer)


def _turns(case: Case) -> tuple[Tensor, Tensor]:
    attn, layout = case.options["block"].attn, case.options["shared"].layout
    head_dim = attn.qkv.in_features // attn.heads
    angles = attn.rope.angles(head_dim, layout.segment_ids, layout.coords, layout.grids)[:, None]
    return angles.cos(), angles.sin()


def _linear(x: Tensor, parameters: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], eps=1e-6)
