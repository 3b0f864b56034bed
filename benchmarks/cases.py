"""The work that is measured: per op, a few calls at representative sizes. To add an op, add a function and list it.

The same cases are compiled ahead of time (benchmarks/aot.py) and timed on a GPU (benchmarks/gpu_suite.py).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sora_fast import use_backend
from sora_fast.kernels._attention_config import ONE_PASS
from sora_fast.kernels._launch import recording
from sora_fast.masks import SpacetimeMask
from sora_fast.nn import BlockContext, DiTBlock
from sora_fast.ops import (
    FactorisedPosition,
    Rope3D,
    adaln,
    gated_residual,
    gated_residual_adaln,
    linear_unpatchify,
    mlp_activation,
    packed_attention,
    patch_embed,
    qk_norm_rope,
    segment_mean,
    unpatchify,
)
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents, RowIndex
from sora_fast.schedule import TileSchedule

Grid = tuple[int, int, int]

# A latent of 16 channels in patches of 1×2×2, as the Sora-like models with a modern video autoencoder have it.
CHANNELS, PATCH = 16, (1, 2, 2)
# The smallest patch in use, and about the largest: of raw pixels.
OTHER_PATCHES = ((4, (1, 1, 1)), (3, (4, 16, 16)))
# One of every shape that attention splits a head into, up to the widest, and the commonest of each.
HEAD_DIMS = (64, 72, 80, 96, 128, 192, 256)


@dataclass(frozen=True, eq=False)
class Setting:
    """How large the cases are, and where their tensors live."""

    device: torch.device
    dtype: torch.dtype
    grids: tuple[Grid, ...]  # token grids of the batch: videos and images mixed
    widths: tuple[int, ...]
    head_dims: tuple[int, ...]
    heads: int

    @staticmethod
    def ahead_of_time() -> "Setting":
        """Tiny tensors, every width and head dim that the kernels are built for."""
        grids = ((4, 8, 8), (1, 8, 16), (2, 8, 8))
        return Setting(torch.device("cpu"), torch.bfloat16, grids, (384, 1152, 3072, 5120), HEAD_DIMS, 2)

    @staticmethod
    def on_gpu() -> "Setting":
        """About 32k tokens: four videos and three images, of seven shapes."""
        grids = ((16, 24, 40), (8, 30, 32), (1, 64, 48), (1, 32, 32), (4, 16, 24), (1, 24, 40), (4, 16, 32))
        return Setting(torch.device("cuda"), torch.bfloat16, grids, (1152, 3072), (72, 128), 16)

    @staticmethod
    def on_one_core() -> "Setting":
        """About 1,700 tokens in fp32: a video and an image."""
        return Setting(torch.device("cpu"), torch.float32, ((4, 12, 20), (1, 32, 24)), (384,), (64,), 6)

    @staticmethod
    def small(device: torch.device) -> "Setting":
        """A walk through every case in seconds, even interpreted."""
        return Setting(device, torch.float32, ((2, 4, 4), (1, 5, 3)), (64,), (64,), 2)

    def layout(self, **options: Any) -> PackedLayout:
        """The batch, laid out."""
        return PackedLayout.from_grids(self.grids, device=self.device, **options)

    def rows(self, layout: PackedLayout) -> RowIndex:
        """One modulation row a segment."""
        return Conditioning.per_segment(torch.rand(layout.max_segments, device=self.device), layout).rows

    def random(self, *shape: int) -> Tensor:
        """Normal random numbers."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)


@dataclass(frozen=True, eq=False)
class Case:
    """One call `op(*args, **options)`; gradients are asked for every floating-point tensor among `args`, and for the
    pixels of ragged latents and the tables of positions that require one.

    label: tells the case from the op's others. bytes_moved, flops: (forward, backward), the least that any
    implementation must do; zeros where that is not what limits the op.
    """

    op: Callable[..., Any]
    label: str
    args: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    bytes_moved: tuple[int, int] = (0, 0)
    flops: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for argument in self.args:
            if isinstance(argument, Tensor) and argument.is_floating_point():
                argument.requires_grad_()

    @property
    def name(self) -> str:
        return f"{self.op.__name__}[{self.label}]"

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that gradients are asked for."""
        tensors = [tensor for argument in self.args for tensor in _held(argument)]
        return tuple(t for t in tensors if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad)

    def widened(self) -> "Case":
        """The same work on the same numbers, in the next wider dtype: fp32, or fp64 for fp32."""
        return replace(self, args=tuple(_widened(argument) for argument in self.args))

    def has_kernels(self) -> bool:
        """True if the op launches Triton kernels here."""
        with recording((9, 0)) as recorder, use_backend("triton"):
            self.forward()
        return bool(recorder.launches)

    def forward(self) -> tuple[Tensor, ...]:
        """The outputs."""
        result = self.op(*self.args, **self.options)
        if isinstance(result, RaggedLatents):
            return (result.flat,)
        return result if isinstance(result, tuple) else (result,)

    def backward(self, outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of the inputs; may be called many times for the same outputs."""
        return torch.autograd.grad(outputs, self.inputs, gradients, retain_graph=True)

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward; the outputs stand in for their gradients."""
        outputs = self.forward()
        return self.backward(outputs, outputs)


class OnePassCase(Case):
    """Attention whose backward pass takes the one-pass form, whichever the configuration table prefers."""

    def backward(self, outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with one_pass_backward():
            return super().backward(outputs, gradients)


def one_pass_backward() -> AbstractContextManager[Any]:
    """Inside, attention's backward pass takes the one-pass form, unless it must be deterministic."""
    return patch.dict(ONE_PASS, dict.fromkeys(ONE_PASS, 256))


def _held(argument: Any) -> tuple[Any, ...]:
    if isinstance(argument, RaggedLatents):
        return (argument.flat,)
    return argument.tables if isinstance(argument, FactorisedPosition) else (argument,)


def _widened(argument: Any) -> Any:
    if isinstance(argument, Tensor) and argument.is_floating_point():
        wide = torch.float64 if argument.dtype == torch.float32 else torch.float32
        return argument.detach().to(wide).requires_grad_(argument.requires_grad)
    if isinstance(argument, RaggedLatents):
        return argument.with_flat(_widened(argument.flat))
    if isinstance(argument, FactorisedPosition):
        return FactorisedPosition(*map(_widened, argument.tables))
    return argument


def all_cases(setting: Setting) -> Iterator[Case]:
    """Every case of every op, one at a time, so that only one case's tensors are alive."""
    for cases in (_modulation, _qk_norm_rope, _attention, _patches, _final_layer, _mlp_activation, _segment_mean):
        yield from cases(setting)


def measured_cases(setting: Setting) -> Iterator[Case]:
    """Every case of every op, then what they make together. (Compiled ahead of time, that would be the same again.)"""
    yield from all_cases(setting)
    yield from _product_then_scatter(setting)
    yield _dit_block(setting)


def modulation(s: Setting, width: int) -> dict[str, Case]:
    """A case of each of the ops that modulate tokens, by its name; one modulation row a segment."""
    layout = s.layout()
    rows = s.rows(layout)
    x, branch = (s.random(layout.capacity, width) for _ in range(2))
    shift, scale, gate = (s.random(layout.max_segments, width) for _ in range(3))
    label, once = f"C{width}", x.nbytes
    cases = (
        Case(adaln, label, (x, shift, scale, rows), bytes_moved=(2 * once, 3 * once)),
        Case(gated_residual, label, (x, branch, gate, rows), bytes_moved=(3 * once, 3 * once)),
        Case(gated_residual_adaln, label, (x, branch, gate, shift, scale, rows), bytes_moved=(4 * once, 6 * once)),
    )
    return {case.op.__name__: case for case in cases}


def modulation_step(
    op: Callable[..., Any], peer: Callable[..., Any], *, compiled: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of `peer` on what `op` is measured with on one core; run once already."""
    torch.manual_seed(0)
    case = modulation(Setting.on_one_core(), 384)[op.__name__]
    case = replace(case, op=torch.compile(peer, fullgraph=True) if compiled else peer)
    case.step()
    return case.step


def _modulation(s: Setting) -> Iterator[Case]:
    for width in s.widths:
        cases = modulation(s, width)
        yield from cases.values()
        yield _with_affine(cases["adaln"], "layer")
        yield _with_affine(cases["gated_residual_adaln"], "rms")


def _with_affine(case: Case, norm: str) -> Case:
    """The same work with a norm that has a weight and a bias; they move no bytes to speak of."""

    @wraps(case.op)
    def op(*args: Any) -> Any:
        *tensors, weight, bias = args
        return op.__wrapped__(*tensors, norm=norm, weight=weight, bias=bias)

    vectors = torch.randn(2, case.args[0].shape[1]).to(case.args[0]).unbind()
    return replace(case, op=op, label=f"{norm},affine,{case.label}", args=(*case.args, *vectors))


def _qk_norm_rope(s: Setting) -> Iterator[Case]:
    layout = s.layout()
    for head_dim in s.head_dims:
        q, k, _ = s.random(layout.capacity, 3, s.heads, head_dim).unbind(1)
        weights = s.random(head_dim), s.random(head_dim)
        once = q.numel() * q.element_size()
        args = (q, k, *weights, layout, Rope3D())
        yield Case(qk_norm_rope, f"D{head_dim}", args, bytes_moved=(4 * once, 6 * once))


def _attention(s: Setting) -> Iterator[Case]:
    masks = {
        "full": SpacetimeMask.full(),
        "frame_causal": SpacetimeMask.frame_causal(),
        "window": SpacetimeMask.window(2, 6, 6),
        "token_causal": SpacetimeMask.token_causal(),
    }
    text = PackedLayout.from_grids([(77, 1, 1)] * len(s.grids), device=s.device)
    for head_dim in s.head_dims:
        for name, mask in masks.items():
            yield _self_attention(s, head_dim, name, mask)
        for name in ("full", "window"):
            yield _self_attention(s, head_dim, f"{name},one pass", masks[name], case=OnePassCase)
        for case in (Case, OnePassCase):
            label = "window,grouped" + ",one pass" * (case is OnePassCase)
            yield _self_attention(s, head_dim, label, masks["window"], case=case, group=2)
        layout = s.layout(order="tiled")
        q = s.random(layout.capacity, s.heads, head_dim)
        k, v = s.random(text.capacity, 2, s.heads, head_dim).unbind(1)
        work = _products(77 * layout.capacity, q)
        options = {"kv_layout": text}
        yield Case(packed_attention, f"cross,D{head_dim}", (q, k, v, layout), options, flops=work)


def _self_attention(
    s: Setting, head_dim: int, label: str, mask: SpacetimeMask, *, case: type[Case] = Case, group: int = 1
) -> Case:
    """group: query heads that share one of keys and values."""
    layout = s.layout(order="tiled", for_mask=mask)
    q, k = (s.random(layout.capacity, heads, head_dim) for heads in (s.heads, s.heads // group))
    v = s.random(layout.capacity, 3, k.shape[1], head_dim)[:, 2]  # as it comes out of a fused projection
    args = (q, k, v, layout, TileSchedule.build(layout, mask))  # shared by a model's layers, so not timed
    work = _products(sum(_pairs(mask, grid) for grid in s.grids), q)
    return case(packed_attention, f"{label},D{head_dim}", args, {"deterministic": False}, flops=work)


def _products(pairs: int, q: Tensor) -> tuple[int, int]:
    """FLOPs of the two matrix products forward, and of the five backward, the recomputed scores included."""
    product = 2 * pairs * q.shape[1] * q.shape[2]
    return 2 * product, 5 * product


def _pairs(mask: SpacetimeMask, grid: Grid) -> int:
    """How many (query, key) pairs `mask` allows in a segment: a box counts axis by axis."""
    tokens = math.prod(grid)
    if mask.causal_tokens:
        return tokens * (tokens + 1) // 2
    lines = [(grid[0], 1, 1), (1, grid[1], 1), (1, 1, grid[2])]
    return math.prod(int(mask.materialize(PackedLayout.from_grids([line])).sum()) for line in lines)


def _patches(s: Setting) -> Iterator[Case]:
    for width in s.widths:
        yield _patch_embed(s, width)
    for channels, patch_size in OTHER_PATCHES:
        yield _patch_embed(s, s.widths[0], channels, patch_size)
    case = _patch_embed(s, s.widths[-1])
    latents, *rest = case.args
    with_gradient = latents.with_flat(latents.flat.clone().requires_grad_())
    tables = FactorisedPosition(*(s.random(64, s.widths[-1]).requires_grad_() for _ in range(3)))
    once = case.bytes_moved[0]
    yield replace(
        case,
        label=f"tables and pixels,{case.label}",
        args=(with_gradient, *rest, tables),
        bytes_moved=(once, 2 * once),
    )
    for channels, patch_size in ((CHANNELS, PATCH), *OTHER_PATCHES):
        latents, layout = _latents(s, channels, patch_size)
        tokens = s.random(layout.capacity, channels * math.prod(patch_size))
        moved = (2 * tokens.nbytes, 2 * tokens.nbytes)
        yield Case(unpatchify, f"K{tokens.shape[1]}", (tokens, layout, patch_size, latents), bytes_moved=moved)


def _latents(s: Setting, channels: int, patch_size: Grid) -> tuple[RaggedLatents, PackedLayout]:
    sizes = [[size * p for size, p in zip(grid, patch_size, strict=True)] for grid in s.grids]
    return RaggedLatents.from_list([s.random(channels, *size) for size in sizes]), s.layout(order="tiled")


def _patch_embed(s: Setting, width: int, channels: int = CHANNELS, patch_size: Grid = PATCH) -> Case:
    latents, layout = _latents(s, channels, patch_size)
    volume = channels * math.prod(patch_size)
    args = (latents, s.random(width, volume), s.random(width), layout, patch_size)
    once = (volume + width) * layout.capacity * latents.flat.element_size()
    label = f"C{width}" if patch_size == PATCH else f"K{volume},C{width}"
    # Few pixels are bound by memory, and hundreds by the product.
    flops = 2 * volume * width * layout.capacity if volume > 1024 else 0
    return Case(patch_embed, label, args, bytes_moved=(once, once), flops=(flops, flops))


def _final_layer(s: Setting) -> Iterator[Case]:
    for width in s.widths:
        latents, layout = _latents(s, CHANNELS, PATCH)
        volume = CHANNELS * math.prod(PATCH)
        x, weight, bias = s.random(layout.capacity, width), s.random(volume, width), s.random(volume)
        once = x.nbytes + latents.flat.nbytes
        args = (x, weight, bias, layout, PATCH, latents)
        yield Case(linear_unpatchify, f"C{width}", args, bytes_moved=(once, once + x.nbytes))


def _product_then_scatter(s: Setting) -> Iterator[Case]:
    """The same work in the other form that FinalLayerConfig chooses from."""

    @wraps(linear_unpatchify)
    def op(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> RaggedLatents:
        return unpatchify(torch.nn.functional.linear(x, weight, bias), *rest)

    for case in _final_layer(s):
        yield replace(case, op=op, label=f"product then scatter,{case.label}")


def _mlp_activation(s: Setting) -> Iterator[Case]:
    tokens = s.layout().capacity
    for width in s.widths:
        for activation, kept in (("gelu", 1.0), ("swiglu", 0.5)):
            x, bias = s.random(tokens, 4 * width), s.random(4 * width)
            moved = (int((1 + kept) * x.nbytes), int((2 + kept) * x.nbytes))
            yield Case(mlp_activation, f"{activation},H{4 * width}", (x, bias, activation), bytes_moved=moved)


def _dit_block(s: Setting) -> Case:
    """A whole block in full attention, on a GPU one of DiT-XL, with a gradient for every parameter and table."""
    dim, layout = s.widths[0], s.layout()
    block = DiTBlock(dim, s.heads, rope=Rope3D()).to(s.device, s.dtype)
    shared = BlockContext(layout, TileSchedule.build(layout), s.rows(layout))
    names = [name for name, _ in block.named_parameters() if not name.startswith("adaLN")]

    def dit_block(x: Tensor, h: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        parameters = dict(zip(names, tensors[8:], strict=True))
        return torch.func.functional_call(block, parameters, (x, h, tensors[:6], tensors[6:8], shared))

    tables = [s.random(layout.max_segments, dim) for _ in range(8)]
    parameters = [block.get_parameter(name).detach().clone() for name in names]
    args = (s.random(layout.capacity, dim), s.random(layout.capacity, dim), *tables, *parameters)
    products = 24 * layout.capacity * dim**2
    pairs = sum(math.prod(grid) ** 2 for grid in s.grids)
    return Case(dit_block, f"C{dim}", args, flops=(products + 4 * pairs * dim, 2 * products + 10 * pairs * dim))


def _segment_mean(s: Setting) -> Iterator[Case]:
    layout = s.layout()
    for width in s.widths:
        x = s.random(layout.capacity, width)
        yield Case(segment_mean, f"C{width}", (x, layout), bytes_moved=(x.nbytes, x.nbytes))
