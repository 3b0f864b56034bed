"""Wan of diffusers on our ops: its numbers."""

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from sora_fast.integrations.diffusers import applied
from tests.wan import arguments, in_bf16, step, wan

_MODELS = {
    "2.1": ({}, {}),
    "2.1 image to video": ({"image_dim": 12}, {}),
    "2.2 5B, a timestep a token": ({}, {"per_token": True}),
    "without a norm before cross-attention": ({"cross_attn_norm": False}, {}),
}


def exact(model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The original in fp64, also where it says `.float()`."""

    def stays(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.to(torch.float32)

    inputs = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in inputs.items()}
    with patch.object(Tensor, "float", stays):
        return step(copy.deepcopy(model).double(), inputs)


@pytest.mark.parametrize("name", _MODELS)
def test_fp32_is_within_1e5_of_fp64(name: str) -> None:
    options, kind = _MODELS[name]
    model = wan(**options)
    inputs = arguments(model, **kind)
    wanted = exact(model, inputs)
    with applied(model) as report:
        assert not report.kept, report
        results = step(model, inputs)
    assert results.keys() == wanted.keys()
    for part, result in results.items():
        error = (result - wanted[part]).abs().max() / wanted[part].abs().max()
        assert error <= 1e-5, f"{part}: {error:.2e}"


@pytest.mark.parametrize(("name", "kept"), [*((name, True) for name in _MODELS), ("2.1", False)])
def test_bf16_is_as_near_to_fp64_as_the_original(name: str, kept: bool) -> None:
    """Of the output, and of all gradients together: of a small tensor the ratio of two roundings is luck. So it is of
    a narrow model: 1.056 was seen at a width of 24."""
    options, kind = _MODELS[name]
    model = in_bf16(wan(heads=8, **options), kept=kept)
    inputs = arguments(model, **kind)
    wanted, theirs = exact(model, inputs), step(model, inputs)
    theirs = {part: x.clone() for part, x in theirs.items()}
    with applied(model) as report:
        assert not report.kept, report
        ours = step(model, inputs)
    gradients = [part for part in wanted if part != "output"]
    for parts in (["output"], gradients):
        mine, other = (_distance(results, wanted, parts) for results in (ours, theirs))
        assert mine <= 1.05 * other, f"{parts[0]}: {mine:.2e} and {other:.2e}"


def _distance(results: dict[str, Tensor], wanted: dict[str, Tensor], parts: list[str]) -> float:
    shares = [(results[part].double() - wanted[part]).norm() / wanted[part].norm() for part in parts]
    return torch.stack(shares).square().mean().sqrt().item()


def test_fused_projections() -> None:
    model = wan(image_dim=12)
    for block in model.blocks:
        block.attn1.fuse_projections()
        block.attn2.fuse_projections()
    inputs = arguments(model)
    wanted = step(model, inputs)["output"]
    with applied(model) as report:
        assert not report.kept, report
        torch.testing.assert_close(step(model, inputs)["output"], wanted, atol=1e-5, rtol=0)


def test_what_the_replaced_attention_does_not_take_is_refused_by_name() -> None:
    model = wan()
    attn, x = model.blocks[0].attn1, torch.randn(1, 3, 24)
    with applied(model, check=False):
        with pytest.raises(ValueError, match="attention_mask: given"):
            attn(x, None, torch.ones(3, 3))
        with pytest.raises(ValueError, match="attention backend: native"):
            attn.processor._attention_backend = "native"
        with pytest.raises(ValueError, match="context parallelism"):
            attn.processor._parallel_config = object()
        model.reset_attention_backend()
