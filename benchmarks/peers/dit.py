"""diffusers' DiT, with the weights of one of ours."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.entrants import Absent
from sora_fast.models import SoraDiT

# Our name of a layer (the published one), and theirs; those of a block come once a block.
_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_LAYERS_OF_A_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
# They keep a copy of the conditioning's layers in every block.
_COPIED = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}


def diffusers_dit(model: SoraDiT, side: int) -> torch.nn.Module:
    """`model`, a DiT of sora_fast.integrations.dit, as diffusers has it, for latents of side × side pixels.

    Two of its constants are not the published ones, and are set to them: the epsilon of a norm (1e-5 for 1e-6), and
    the frequencies of the timestep embedding, which it spreads over one less than half of the channels.
    Raises Absent where diffusers is not installed.
    """
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise Absent("diffusers is not installed") from error
    config = model.config
    theirs = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.dim // config.heads,
        in_channels=config.in_channels,
        out_channels=config.in_channels * (2 if config.learned_sigma else 1),
        num_layers=config.depth,
        sample_size=side,
        patch_size=config.patch_size[-1],
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    ).to(next(model.parameters()).device)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    expected = {name for name in theirs.state_dict() if name != "pos_embed.pos_embed"}
    state = _converted(model)
    if set(state) != expected:
        raise Absent(f"this diffusers names its weights in another way: {sorted(set(state) ^ expected)[:4]}")
    theirs.load_state_dict(state, strict=False)  # its positions are its own
    return theirs.eval()


def _converted(model: SoraDiT) -> dict[str, Tensor]:
    ours = model.state_dict()
    state: dict[str, Tensor] = {}

    def copy(name: str, theirs: str) -> None:
        state.update({f"{theirs}.{part}": ours[f"{name}.{part}"] for part in ("weight", "bias")})

    for name, theirs in _LAYERS.items():
        copy(name, theirs)
    side = model.config.patch_size[-1]
    state["pos_embed.proj.weight"] = state["pos_embed.proj.weight"].unflatten(1, (-1, side, side))
    for index in range(model.config.depth):
        here, there = f"blocks.{index}", f"transformer_blocks.{index}"
        for name, theirs in _LAYERS_OF_A_BLOCK.items():
            copy(f"{here}.{name}", f"{there}.{theirs}")
        for name, theirs in _COPIED.items():
            copy(name, f"{there}.norm1.emb.{theirs}")
        table = "embedding_table.weight"
        state[f"{there}.norm1.emb.class_embedder.{table}"] = ours[f"y_embedder.{table}"]
        for part in ("weight", "bias"):
            thirds = ours[f"{here}.attn.qkv.{part}"].chunk(3)
            state.update({f"{there}.attn1.to_{n}.{part}": third for n, third in zip("qkv", thirds, strict=True)})
    return state


def call(module: Any, images: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """[S, C, H, W] → [S, C or 2C, H, W]."""
    return module(images, timestep=t, class_labels=labels, return_dict=False)[0]
