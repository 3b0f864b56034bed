"""Tiny Wan models of diffusers with random weights, and a training step of them."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor


def wan(*, heads: int = 2, image_dim: int | None = None, **options: Any) -> WanTransformer3DModel:
    """image_dim: with image to video's tokens of an image, beside the text's 512."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": heads, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    image = {} if image_dim is None else {"image_dim": image_dim, "added_kv_proj_dim": heads * 12}
    model = WanTransformer3DModel(**sizes, **image, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, **options)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones and zeros would hide which weight is whose
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2)
    return model


def in_bf16(model: WanTransformer3DModel, *, kept: bool) -> WanTransformer3DModel:
    """kept: as `from_pretrained` has it, with the modulation table, the norms and the time embedding in fp32."""
    model.bfloat16()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if kept and {"rope", *model._keep_in_fp32_modules}.intersection(name.split(".")):
            tensor.data = tensor.data.float()
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
