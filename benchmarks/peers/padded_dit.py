"""SoraDiT in plain PyTorch on padded batches [B, L]: what a trainer without packing runs, on the weights of ours.

Patches are cut, and sines and tables of positions made, before any step is timed, which packing does in the step: the
peer is given that for nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sora_fast.diffusion import RectifiedFlow
from sora_fast.models import SoraDiT
from sora_fast.packing import PackedLayout


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """B samples of up to L tokens: patches, noise [B, L, K], sigma [B], positions [B, L, C], cos, sin [B, 1, L, D/2].

    real [B, L] bool: which tokens are no padding; None where all are, as in a bucket of one shape.
    """

    patches: Tensor
    noise: Tensor
    sigma: Tensor
    positions: Tensor
    cos: Tensor
    sin: Tensor
    real: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.patches, self.noise, self.sigma, self.positions, self.cos, self.sin, self.real


def padded_batch(
    model: SoraDiT, videos: Sequence[Tensor], noises: Sequence[Tensor], sigma: Tensor, *, length: int | None = None
) -> PaddedBatch:
    """Of videos and their noise (C, T, H, W), which patches must fill; padded to `length`, or the longest."""
    size = model.config.patch_size
    grids = [tuple(n // p for n, p in zip(video.shape[1:], size, strict=True)) for video in videos]
    lengths = [math.prod(grid) for grid in grids]
    length = max(lengths) if length is None else length
    layouts = [PackedLayout.from_grids([grid]) for grid in grids]

    def padded(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([F.pad(part, (0, 0, 0, length - part.shape[0])) for part in parts])

    turns = padded([_angles(model, layout) for layout in layouts])[:, None]
    real = torch.arange(length) < torch.tensor(lengths)[:, None]
    return PaddedBatch(
        padded([_cut(video, size) for video in videos]),
        padded([_cut(noise, size) for noise in noises]),
        sigma,
        padded([_positions(model, layout) for layout in layouts]),
        turns.cos(),
        turns.sin(),
        None if min(lengths) == length else real,
    )


class PaddedDiT(nn.Module):
    """The loss of a SoraDiT without text and labels, its weights shared, for one noise level a sample."""

    def __init__(self, model: SoraDiT, path: RectifiedFlow, *, compile_blocks: bool = False) -> None:
        """compile_blocks: a graph that all share, for each shape; else the caller may compile it all."""
        super().__init__()
        self.model, self.path = model, path
        self._block = torch.compile(_block, fullgraph=True, dynamic=False) if compile_blocks else _block

    def forward(
        self,
        patches: Tensor,
        noise: Tensor,
        sigma: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        real: Tensor | None,
    ) -> Tensor:
        """The mean over what is real, weighted by the path; see `PaddedBatch`."""
        model, level = self.model, sigma[:, None, None]
        condition = model.t_embedder(sigma * 1000)
        x = model.x_embedder.proj(self.path.add_noise(patches, noise, level)) + positions
        mask = None if real is None else real[:, None, None, :]
        for block in model.blocks:
            x = self._block(block, x, block.adaLN_modulation(condition), cos, sin, mask)
        shift, scale = (table[:, None] for table in model.final_layer.adaLN_modulation(condition))
        prediction = model.final_layer.linear(_norm(x) * (1 + scale) + shift)
        prediction = rearrange(prediction, "b l (p c) -> b l (c p)", p=math.prod(model.config.patch_size))
        error = (prediction - self.path.target(patches, noise, level)).square() * self.path.loss_weight(level)
        return error.mean() if real is None else error.mean(dim=2)[real].mean()


def _block(
    block: nn.Module, x: Tensor, tables: tuple[Tensor, ...], cos: Tensor, sin: Tensor, mask: Tensor | None
) -> Tensor:
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (table[:, None] for table in tables)
    attn = block.attn
    qkv = rearrange(attn.qkv(_norm(x) * (1 + scale) + shift), "b l (n h d) -> n b h l d", n=3, h=attn.heads)
    q, k = (F.rms_norm(y, y.shape[-1:], w, 1e-6) for y, w in ((qkv[0], attn.q_norm), (qkv[1], attn.k_norm)))
    attended = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), qkv[2], attn_mask=mask)
    x = x + gate * attn.proj(rearrange(attended, "b h l d -> b l (h d)"))
    hidden = F.gelu(block.mlp.fc1(_norm(x) * (1 + scale_mlp) + shift_mlp), approximate="tanh")
    return x + gate_mlp * block.mlp.fc2(hidden)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def _cut(video: Tensor, size: tuple[int, int, int]) -> Tensor:
    t, h, w = size
    return rearrange(video, "c (t a) (h b) (w d) -> (t h w) (c a b d)", a=t, b=h, d=w)


def _angles(model: SoraDiT, layout: PackedLayout) -> Tensor:
    attn = model.blocks[0].attn
    return attn.rope.angles(model.config.dim // attn.heads, layout.segment_ids, layout.coords, layout.grids)


def _positions(model: SoraDiT, layout: PackedLayout) -> Tensor:
    tables = model.pos_embed(layout)
    return sum(table[layout.coords[:, axis].long()] for axis, table in enumerate((tables.t, tables.h, tables.w)))
