"""DiTBlock on packed videos, forward and backward on one core, beside the same block in plain PyTorch.

The plain one takes the packed batch too: products over all tokens, and attention segment by segment.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_fast.nn import BlockContext, DiTBlock
from sora_fast.ops import adaln
from sora_fast.packing import Conditioning, PackedLayout
from sora_fast.schedule import TileSchedule

DIM, HEADS = 384, 6
GRIDS = [(4, 8, 10), (1, 16, 12), (2, 6, 10)]
LAYOUT = PackedLayout.from_grids(GRIDS)
LENGTHS = [t * h * w for t, h, w in GRIDS]

Step = Callable[[Tensor, tuple[Tensor, ...]], Tensor]


class PlainBlock(nn.Module):
    """DiT's block as its authors wrote it, on DiTBlock's weights."""

    def __init__(self, block: DiTBlock) -> None:
        super().__init__()
        self.attn, self.mlp = block.attn, block.mlp

    def forward(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        segments = LAYOUT.segment_ids.long()
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (table[segments] for table in tables)
        x = x + gate * self._attend(_norm(x) * (1 + scale) + shift)
        hidden = F.gelu(self.mlp.fc1(_norm(x) * (1 + scale_mlp) + shift_mlp), approximate="tanh")
        return x + gate_mlp * self.mlp.fc2(hidden)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(x).unflatten(1, (3, HEADS, -1)).unbind(1)
        q, k = F.rms_norm(q, q.shape[2:], self.attn.q_norm), F.rms_norm(k, k.shape[2:], self.attn.k_norm)
        parts = zip(*(part.transpose(0, 1).split(LENGTHS, dim=1) for part in (q, k, v)), strict=True)
        attended = [F.scaled_dot_product_attention(*(x[None] for x in part))[0] for part in parts]
        return self.attn.proj(torch.cat(attended, dim=1).transpose(0, 1).flatten(1))


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], eps=1e-6)


def packed(block: DiTBlock) -> Step:
    """The block and the norm in front of it. (It also makes the norm of a next block, which nobody reads here.)"""
    conditioning = Conditioning.per_segment(torch.zeros(len(GRIDS)), LAYOUT)
    shared = BlockContext(LAYOUT, TileSchedule.build(LAYOUT), conditioning.rows)

    def run(x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        h = adaln(x, *tables[:2], shared.rows)
        return block(x, h, tables, tables[:2], shared)[0]

    return run


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("form", [PlainBlock, packed], ids=["plain", "packed"])
def test_block(benchmark: Any, form: Callable[[DiTBlock], Step], compiled: bool) -> None:
    torch.manual_seed(0)
    block = DiTBlock(DIM, HEADS)
    x = torch.randn(LAYOUT.capacity, DIM, requires_grad=True)
    tables = torch.randn(6, len(GRIDS), DIM).unbind(0)
    run = torch.compile(form(block), fullgraph=True) if compiled else form(block)
    leaves = [x, *block.attn.parameters(), *block.mlp.parameters()]
    d_out = torch.randn(x.shape)

    def step() -> None:
        torch.autograd.grad(run(x, tables), leaves, d_out)

    step()
    benchmark(step)
