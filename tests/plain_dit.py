"""DiT in plain PyTorch, one image at a time, on the weights of a checkpoint of its published layout."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_dit(
    weights: Mapping[str, Tensor], image: Tensor, timestep: float, label: int, *, heads: int, eps: float = 1e-6
) -> Tensor:
    """DiT's forward pass for one image (C, H, W), written out (Peebles & Xie 2023, its official models.py)."""
    w, kernel = weights, weights["x_embedder.proj.weight"]
    dim, _, patch, _ = kernel.shape
    _, height, width = image.shape
    rows, columns = height // patch, width // patch
    depth = sum(name.endswith(".attn.qkv.weight") for name in w)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = F.conv2d(image[None], kernel, w["x_embedder.proj.bias"], stride=patch)[0].flatten(1).T
    x = x + grid_positions(dim, rows, columns).to(x.dtype)

    # In fp32 whatever the weights are, as in the original: a last bit here is 1e-4 of a turn at a late timestep.
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    angles = timestep * frequencies
    c = F.silu(linear(torch.cat([angles.cos(), angles.sin()]).to(x.dtype), "t_embedder.mlp.0"))
    c = linear(c, "t_embedder.mlp.2") + w["y_embedder.embedding_table.weight"][label]

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (dim,), eps=eps) * (1 + scale) + shift

    for index in range(depth):
        name = f"blocks.{index}"
        chunks = linear(F.silu(c), f"{name}.adaLN_modulation.1").chunk(6)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = chunks
        qkv = linear(norm(x, shift_msa, scale_msa), f"{name}.attn.qkv")
        q, k, v = qkv.view(-1, 3, heads, dim // heads).permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)
        x = x + gate_msa * linear(attended, f"{name}.attn.proj")
        hidden = F.gelu(linear(norm(x, shift_mlp, scale_mlp), f"{name}.mlp.fc1"), approximate="tanh")
        x = x + gate_mlp * linear(hidden, f"{name}.mlp.fc2")
    shift, scale = linear(F.silu(c), "final_layer.adaLN_modulation.1").chunk(2)
    x = linear(norm(x, shift, scale), "final_layer.linear").view(rows, columns, patch, patch, -1)
    return x.permute(4, 0, 2, 1, 3).reshape(-1, height, width)


def grid_positions(dim: int, rows: int, columns: int) -> Tensor:
    """[rows · columns, dim] float32: the column in the first half, the row in the second, each [sin | cos]."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def encode(place: Tensor) -> Tensor:
        angles = place.double()[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([encode(column.flatten()), encode(row.flatten())], dim=1).float()
