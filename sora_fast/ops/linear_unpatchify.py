"""linear_unpatchify: a linear map from packed tokens straight to the pixels of ragged latents."""

from typing import Any

import torch
from torch import Tensor

from sora_fast.ops import _patches_torch
from sora_fast.ops._checks import FLOAT_DTYPES, check_device, check_dtype, check_layout, check_shape, once
from sora_fast.ops._dispatch import choose
from sora_fast.ops._op import kernels, op
from sora_fast.ops._patches import PatchSize, check_order, check_patch_size, geometry, offered_patches, reordered
from sora_fast.ops.unpatchify import _unpatchify_backward, channels_of, unpatchify, videos_of
from sora_fast.packing import PackedLayout, RaggedLatents


def linear_unpatchify(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: PackedLayout,
    patch_size: PatchSize,
    shapes: Tensor | RaggedLatents,
    *,
    capacity: int | None = None,
    order: str = "thwc",
    backend: str | None = None,
) -> RaggedLatents:
    """unpatchify(x · weightᵀ + bias), without the rows in between: a product writes its pixels itself.

    x: [N, C]; padding is not read. weight: [pt·ph·pw·Cout, C], bias: [pt·ph·pw·Cout] or None, their rows laid out as
        `order` says. All of one dtype (bf16, fp16, fp32; fp64 on all backends but Triton).
    order: as in `unpatchify`. On every backend the weight's rows are put into the first one's, "thwc", before the
        product: a copy of the weight, where the order is another.
    layout, patch_size, shapes, capacity, and what is returned: as in `unpatchify`.
    Differentiable in x, weight and bias; the gradients are those of two plain products.
    """
    _check(x, weight, bias, layout, patch_size, order)
    channels = channels_of("weight rows", weight.shape[0], patch_size)
    weight = reordered(weight, 0, patch_size, order, "thwc")
    bias = None if bias is None else reordered(bias, 0, patch_size, order, "thwc")
    chosen = choose("linear_unpatchify", backend, x.device, offered_patches(x), x.dtype)
    if chosen != "triton":
        rows = _patches_torch.linear(x, weight, bias, layout)
        return unpatchify(rows, layout, patch_size, shapes, capacity=capacity, backend=backend)
    offsets, shapes, capacity = videos_of(channels, layout, patch_size, shapes, capacity, backend=chosen)
    places = geometry(offsets, shapes, layout, patch_size)
    return RaggedLatents(_linear_unpatchify(x, weight, bias, *places, capacity), offsets, shapes)


@op("sora_fast::linear_unpatchify")
def _linear_unpatchify(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    shapes: Tensor,
    segment_ids: Tensor,
    coords: Tensor,
    patch_size: list[int],
    capacity: int,
) -> Tensor:
    patches = kernels("_patches").Patches(offsets, shapes, segment_ids, coords, tuple(patch_size))
    return kernels("linear_unpatchify").scatter_product(x, weight, bias, patches, capacity, channel_last=True)


@_linear_unpatchify.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *geometry, ctx.patch_size, _ = inputs
    ctx.save_for_backward(x, weight, *geometry)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *geometry = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    rows = _unpatchify_backward(grad, *geometry, ctx.patch_size, "thwc", weight.shape[0])  # zeros for padding
    used = (geometry[2] >= 0)[:, None]
    d_x = rows @ weight if needs_x else None
    d_weight = rows.T @ torch.where(used, x, 0) if needs_weight else None
    d_bias = rows.sum(dim=0) if needs_bias else None
    return d_x, d_weight, d_bias, *[None] * 6


_linear_unpatchify.register_autograd(_backward, setup_context=_save)


@once
def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: PackedLayout, patch_size: PatchSize, order: str
) -> None:
    check_order(order)
    check_patch_size(patch_size)
    check_layout(layout)
    check_shape("x", x, [layout.capacity, "C"])
    check_dtype("x", x, FLOAT_DTYPES)
    check_device("x", x, "the layout", layout.device)
    check_shape("weight", weight, ["pt·ph·pw·Cout", x.shape[1]])
    given = {"weight": weight}
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1])
        given["bias"] = bias
    for name, tensor in given.items():
        check_dtype(name, tensor, [x.dtype])
        check_device(name, tensor, "x", x.device)
