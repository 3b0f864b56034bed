"""Tiny Wan models of diffusers with random weights, and a training step of them."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

# Image to video has tokens of an image beside the text's 512.
IMAGE = {"image_dim": 12, "added_kv_proj_dim": 24}


def wan(**options: Any) -> WanTransformer3DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    model = WanTransformer3DModel(**sizes, text_dim=16, freq_dim=16, ffn_dim=32, **options)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones and zeros would hide which weight is whose
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2)
    return model


def arguments(model: WanTransformer3DModel, *, per_token: bool = False) -> dict[str, Any]:
    """Two videos of 3 × 4 × 6 latents, 18 tokens each; per_token: timesteps of every token."""
    generator = torch.Generator().manual_seed(1)
    dtype, image = model.patch_embedding.weight.dtype, model.config.image_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_states": random(2, 4, 3, 4, 6),
        "timestep": torch.randint(1000, (2, 18) if per_token else (2,), generator=generator),
        "encoder_hidden_states": random(2, 512 if image else 5, 16),
        "encoder_hidden_states_image": random(2, 3, image) if image else None,
    }


def step(model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The output, and the gradients of all parameters that want one."""
    model.zero_grad()
    out = model(**inputs, return_dict=False)[0]
    torch.manual_seed(2)
    out.backward(torch.randn(out.shape).to(out.dtype))
    return {"output": out.detach()} | {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
