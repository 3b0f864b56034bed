"""What a kernel must get right before it is chosen: few cases, but decisive ones. To add an op, add a function.

Every case is ragged: segments of several tiles, of one token and of none, lengths that are a multiple of nothing,
padding that holds NaN, strides of a fused projection, gradients in a fixed order and in any.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sora_fast.masks import SpacetimeMask
from sora_fast.ops import (
    FactorisedPosition,
    Rope3D,
    RopeTable,
    _library,
    adaln,
    gated_residual,
    gated_residual_adaln,
    linear_unpatchify,
    mlp_activation,
    packed_attention,
    patch_embed,
    qk_norm_rope,
    unpatchify,
)
from sora_fast.ops._attention_cuda import refusal_here
from sora_fast.ops._checks import KERNEL_DTYPES
from sora_fast.ops._dispatch import use_backend
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.proof.calls import Call, adaln_pair_of, form_of
from sora_fast.schedule import TileSchedule

HEADS, CHANNELS = 2, 4


@dataclass(frozen=True, eq=False)
class Trial:
    """A call to judge. idle [n] bool: rows of its outputs whose gradients are NaN, as padding's are; None: none.
    terms: see `error_and_limit`."""

    call: Call
    idle: Tensor | None = None
    terms: float = 1.0


@dataclass(frozen=True)
class Plan:
    """A trial to be made. family: plans of one op that may run in a process of their own, beside the others. backend:
    whose kernels are tried."""

    op: str
    dtype: torch.dtype | None
    label: str
    build: Callable[[torch.device], Trial]
    family: str = ""
    backend: str = "triton"

    @property
    def name(self) -> str:
        dtype = "" if self.dtype is None else f"{str(self.dtype).removeprefix('torch.')},"
        backend = "" if self.backend == "triton" else f"{self.backend},"
        return f"{self.op}[{backend}{dtype}{self.label}]"


@dataclass(frozen=True)
class Sizes:
    """How large the cases are. tile_size: of the layouts; several tiles a segment, whichever it is.

    head_dims: one of every shape that attention splits a head into; central: those that are tried with everything.
    widths: one of every number of columns that a thread of the row kernels may hold.
    """

    grids: tuple[tuple[int, int, int], ...]
    tile_size: int
    widths: tuple[int, ...]
    head_dims: tuple[int, ...]
    central: tuple[int, ...]


COMPILED = Sizes(
    ((2, 9, 12), (3, 5, 7), (1, 1, 1), (0, 2, 2), (1, 4, 5)),
    128,
    (384, 1152, 3072, 5120),
    (128, 72, 64, 256, 192, 96),
    (128, 72),
)
# Of CUDA C++: one of every width that a kernel is compiled for, and one between.
HOPPER = replace(COMPILED, head_dims=(128, 72, 64, 96, 40), central=(128, 72))
# What the interpreter walks through in seconds.
INTERPRETED = Sizes(((2, 3, 5), (1, 1, 1), (0, 2, 2), (3, 2, 4)), 16, (72,), (24,), (24,))


def plans(op: str, dtype: torch.dtype, sizes: Sizes) -> Iterator[Plan]:
    """Those of an op and a dtype; of an op that computes with integers only, the same for each."""
    for label, build, *family in _FAMILIES[op](sizes):
        if op == "schedule":
            yield Plan(op, None, label, lambda device, build=build: Trial(build(device)))
        else:
            yield Plan(op, dtype, label, partial(build, _Pack(sizes, dtype)), *family)


@dataclass(frozen=True)
class _Pack:
    """A batch to make cases of."""

    sizes: Sizes
    dtype: torch.dtype

    def layout(self, device: torch.device, **options: Any) -> PackedLayout:
        tokens = sum(map(math.prod, self.sizes.grids))
        options = {"capacity": tokens + 18, "max_segments": len(self.sizes.grids) + 1, **options}
        return PackedLayout.from_grids(self.sizes.grids, device=device, tile_size=self.sizes.tile_size, **options)

    def random(self, device: torch.device, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32).to(dtype or self.dtype)

    def tokens(self, layout: PackedLayout, *shape: int) -> Tensor:
        """[N, …], one of two parts of a projection, NaN in the padding."""
        x = self.random(layout.device, layout.capacity, 2, *shape)[:, 1]
        return x.masked_fill_(_idle(layout).view(-1, *[1] * len(shape)), math.nan)


def _idle(layout: PackedLayout) -> Tensor:
    return layout.segment_ids < 0


Family = Iterator[tuple[Any, ...]]


def _modulated(
    op: Callable[..., Any], tokens: int, tables: int, normed: bool, sizes: Sizes, *, forms: Mapping[str, "_Form"]
) -> Family:
    def build(
        pack: _Pack,
        device: torch.device,
        *,
        width: int,
        norm: str | None,
        table: torch.dtype | None,
        op: Callable[..., Any] = op,
        tables: int = tables,
    ) -> Trial:
        layout = pack.layout(device)
        sigma = torch.rand(layout.max_segments, device=device, dtype=torch.float32)
        first = (layout.coords[:, 0] == 0) & ~_idle(layout)
        rows = Conditioning.with_clean(sigma, first, layout).rows
        inputs = [pack.tokens(layout, width) for _ in range(tokens)]
        inputs += [pack.random(device, rows.num_rows, width, dtype=table) for _ in range(tables)]
        unused = torch.bincount(rows.index[rows.index >= 0].long(), minlength=rows.num_rows) == 0
        for x in inputs[tokens:]:
            x[unused] = math.nan
        if norm is None:
            return Trial(Call(op, "", (*inputs, rows)), _idle(layout))
        vectors = [pack.random(device, width, dtype=table) for _ in range(2)]
        return Trial(Call(_Affine(op, norm), "", (*inputs, rows, *vectors)), _idle(layout))

    for width in sizes.widths:
        yield f"C{width}", partial(build, width=width, norm=None, table=None)
        if normed:
            affine = partial(build, width=width, norm="rms", table=torch.float32)
            yield f"C{width},rms,affine,fp32 tables", affine, "affine"
    # What is left out changes nothing else, and what is added has the layouts of the rest: the two ends are enough.
    for label, (form, count) in forms.items():
        for width in dict.fromkeys((sizes.widths[0], sizes.widths[-1])):
            yield f"C{width},{label}", partial(build, width=width, norm=None, table=None, op=form, tables=count), label


_Form = tuple[Callable[..., Any], int]  # an op without some of its tables, and how many it takes
_FORMS: Mapping[str, Mapping[str, _Form]] = {
    "adaln": {
        "no shift": (form_of(adaln, 1), 1),
        "norm alone": (form_of(adaln, 1, 2), 0),
        "pair": (adaln_pair_of, 4),
    },
    "gated_residual": {
        "no gate": (form_of(gated_residual, 2), 0),
        "rms branch": (form_of(gated_residual, branch_norm="rms"), 1),
    },
    "gated_residual_adaln": {"no gate": (form_of(gated_residual_adaln, 2), 2)},
}


@dataclass(frozen=True)
class _Affine:
    """`op` with a norm whose weight and bias come last."""

    op: Callable[..., Any]
    norm: str

    def __call__(self, *args: Any, **options: Any) -> Any:
        *tensors, weight, bias = args
        return self.op(*tensors, norm=self.norm, weight=weight, bias=bias, **options)


def _norm_rope(sizes: Sizes) -> Family:
    scaled = Rope3D(scaling="ntk", extent=(None, 32.0, 32.0))

    def build(pack: _Pack, device: torch.device, *, head_dim: int, rope: Rope3D) -> Trial:
        layout = pack.layout(device)
        q, k = pack.tokens(layout, HEADS, head_dim), pack.tokens(layout, 1, head_dim)
        weights = pack.random(device, head_dim), pack.random(device, head_dim)
        scale = torch.full(layout.grids.shape, 0.5, device=device) if rope is scaled else None
        call = Call(qk_norm_rope, "", (q, k, *weights, layout, rope), {"segment_scale": scale})
        return Trial(call, _idle(layout))

    for head_dim in sizes.head_dims:
        yield f"D{head_dim}", partial(build, head_dim=head_dim, rope=Rope3D())
        for label, rope in (("half-split", Rope3D(interleaved=False)), ("scaled", scaled)):
            if head_dim in sizes.central:
                yield f"D{head_dim},{label}", partial(build, head_dim=head_dim, rope=rope), label
        for norm, by_head, alone in (("rms_across_heads", True, False), ("layer", False, False), ("rms", True, True)):
            if head_dim in sizes.central:
                form = partial(_norm_rope_form, head_dim=head_dim, norm=norm, by_head=by_head, alone=alone)
                yield f"D{head_dim},{norm},table{',keys alone' * alone}", form, norm


def _norm_rope_form(
    pack: _Pack, device: torch.device, *, head_dim: int, norm: str, by_head: bool, alone: bool
) -> Trial:
    """Turned by a table that wants a gradient; alone: the keys without queries."""
    layout = pack.layout(device)
    heads = [pack.tokens(layout, HEADS, head_dim) for _ in range(1 if alone else 2)]
    channels = head_dim * (HEADS if norm == "rms_across_heads" else 1)
    vectors = [pack.random(device, channels) for _ in range(len(heads) * (2 if norm == "layer" else 1))]
    shape = (layout.capacity, *([HEADS] if by_head else []), head_dim // 2)
    table = [pack.random(device, *shape, dtype=torch.float32) for _ in range(2)]
    for x in table:
        x[_idle(layout)] = math.nan
    return Trial(Call(_Turned(norm, alone), "", (layout, *heads, *table, *vectors)), _idle(layout))


@dataclass(frozen=True)
class _Turned:
    """`qk_norm_rope` by a table, with all tensors in one line: queries unless the keys are alone, keys, cosines, sines,
    weights, biases."""

    norm: str
    alone: bool

    def __call__(self, layout: PackedLayout, *tensors: Any, backend: str) -> Any:
        if self.alone:
            k, cos, sin, weight = tensors
            return qk_norm_rope(None, k, None, weight, layout, RopeTable(cos, sin), norm=self.norm, backend=backend)[1]
        q, k, cos, sin, *vectors = tensors
        biases = dict(zip(("q_bias", "k_bias"), vectors[2:], strict=False))
        rope = RopeTable(cos, sin, interleaved=False)
        return qk_norm_rope(q, k, *vectors[:2], layout, rope, norm=self.norm, **biases, backend=backend)


# Causal masks have a way of their own in raster order; a tiled one serves the windows.
MASKS: Mapping[str, SpacetimeMask] = {
    "full": SpacetimeMask.full(),
    "frame_causal": SpacetimeMask.frame_causal(),
    "token_causal": SpacetimeMask.token_causal(),
    "window": SpacetimeMask.window(1, 2, 2),
}


def _laid_out(pack: _Pack, device: torch.device, mask: SpacetimeMask) -> PackedLayout:
    return pack.layout(device) if mask.sees_past else pack.layout(device, order="tiled", for_mask=mask)


def _attention(sizes: Sizes) -> Family:
    def build(pack: _Pack, device: torch.device, *, head_dim: int, mask: str, deterministic: bool = False) -> Trial:
        layout = _laid_out(pack, device, MASKS[mask])
        with use_backend("torch"):  # its building is another op
            schedule = TileSchedule.build(layout, MASKS[mask])
        q, k, v = (pack.tokens(layout, heads, head_dim) for heads in (HEADS, 1, 1))
        options = {"deterministic": deterministic, "return_lse": True}
        call = Call(_finite_attention, "", (q, k, v, layout, schedule), options)
        return Trial(call, _idle(layout), slopes(q, k, v))

    def cross(pack: _Pack, device: torch.device, *, head_dim: int) -> Trial:
        layout = pack.layout(device)
        text = PackedLayout.from_grids(
            [(1, 1, length) for length in (37, 5, 0, 3, 20, 0)[: layout.max_segments]],
            capacity=70,
            max_segments=layout.max_segments,
            device=device,
        )
        with use_backend("torch"):
            schedule = TileSchedule.build(layout, kv_layout=text)
        q, k, v = (pack.tokens(where, HEADS, head_dim) for where in (layout, text, text))
        options = {"kv_layout": text, "return_lse": True}
        call = Call(_finite_attention, "", (q, k, v, layout, schedule), options)
        return Trial(call, _idle(layout), slopes(q, k, v))

    for head_dim in sizes.head_dims:
        central = head_dim in sizes.central
        for mask in MASKS if central else ("full", "window"):
            yield f"D{head_dim},{mask}", partial(build, head_dim=head_dim, mask=mask), f"D{head_dim}"
        if central:
            fixed = partial(build, head_dim=head_dim, mask="window", deterministic=True)
            yield f"D{head_dim},window,deterministic", fixed, f"D{head_dim}"
            yield f"D{head_dim},cross", partial(cross, head_dim=head_dim), f"D{head_dim}"


def _finite_attention(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """With 0 as the logsumexp of no key."""
    out, lse = packed_attention(*args, **options)
    return out, lse.masked_fill(lse == -math.inf, 0.0)


def slopes(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor | None = None) -> float:
    """Size of the terms that a gradient of q or k is summed from: (dO·V − delta)·K·scale. The difference is 0 for a
    query with a single key, to the bit in PyTorch's softmax, and to a rounding where delta is dO·O.

    grad_out: [N, H, D]; None: small, as `upstream` makes it.
    """
    q, k, v, grad_out = (x.detach().nan_to_num(0).double() for x in (q, k, v, q if grad_out is None else grad_out))
    if not (q.numel() and k.numel()):
        return 1.0
    longest = (grad_out.norm(dim=2).max() * v.norm(dim=2).max()).item()
    return max(1.0, longest * max(q.abs().max().item(), k.abs().max().item()) * q.shape[2] ** -0.5)


def schedule(
    layout: PackedLayout, mask: SpacetimeMask, *, kv_layout: PackedLayout | None = None, backend: str | None = None
) -> tuple[Tensor, ...]:
    """What is found for a batch, all of it integers; there is no gradient."""
    with nullcontext() if backend is None else use_backend(backend):
        built = TileSchedule.build(layout, mask, kv_layout=kv_layout)
    sides = [(side.begin, side.end, side.order) for side in (built.by_query, built.by_key)]
    return (built.query_low, built.query_high, built.key_place, *sides[0], *sides[1])


def _schedules(sizes: Sizes) -> Family:
    pack = _Pack(sizes, torch.float32)
    for name, mask in MASKS.items():

        def build(device: torch.device, mask: SpacetimeMask = mask) -> Call:
            return Call(schedule, "", (_laid_out(pack, device, mask), mask))

        yield name, build


def _videos(pack: _Pack, device: torch.device, patch_size: tuple[int, int, int]) -> tuple[RaggedLatents, PackedLayout]:
    """Sizes that the patch does not divide, tiled."""
    grids = [grid for grid in pack.sizes.grids if math.prod(grid)]
    shapes = [[max(1, size * p - (p > 1)) for size, p in zip(grid, patch_size, strict=True)] for grid in grids]
    videos = [pack.random(device, CHANNELS, *shape) for shape in shapes]
    elements = sum(video.numel() for video in videos)
    sizes = {"max_segments": len(grids) + 1}
    latents = RaggedLatents.from_list(videos, capacity=elements + 9, **sizes)
    tokens = sum(map(math.prod, grids))
    options = {"capacity": tokens + 18, "tile_size": pack.sizes.tile_size, "device": device, **sizes}
    return latents, PackedLayout.from_grids(grids, order="tiled", **options)


PATCHES = ((1, 2, 2), (2, 4, 4))


def _patch_embed(sizes: Sizes) -> Family:
    def build(pack: _Pack, device: torch.device, *, width: int, patch: tuple[int, int, int], tables: bool) -> Trial:
        latents, layout = _videos(pack, device, patch)
        position = None
        if tables:
            latents = latents.with_flat(latents.flat.clone().requires_grad_())
            rows = int(layout.coords.max()) + 1
            position = FactorisedPosition(*(pack.random(device, rows, width).requires_grad_() for _ in range(3)))
        weight = pack.random(device, width, CHANNELS * math.prod(patch))
        args = (latents, weight, pack.random(device, width), layout, patch, position)
        return Trial(Call(patch_embed, "", args), _idle(layout))

    for width in sizes.widths[:3]:
        for patch in PATCHES:
            label = f"C{width},K{CHANNELS * math.prod(patch)}"
            yield label, partial(build, width=width, patch=patch, tables=patch == PATCHES[0])


def _unpatchify(sizes: Sizes) -> Family:
    def build(pack: _Pack, device: torch.device, *, patch: tuple[int, int, int], order: str = "thwc") -> Trial:
        latents, layout = _videos(pack, device, patch)
        tokens = pack.tokens(layout, CHANNELS * math.prod(patch))
        call = Call(unpatchify, "", (tokens, layout, patch, latents), {"order": order})
        return Trial(call, _past_the_end(latents))

    for patch in PATCHES:
        yield f"K{CHANNELS * math.prod(patch)}", partial(build, patch=patch)
    for order in ("cthw", "hwtc"):
        yield f"K{CHANNELS * math.prod(PATCHES[-1])},{order}", partial(build, patch=PATCHES[-1], order=order)


def _linear_unpatchify(sizes: Sizes) -> Family:
    def build(pack: _Pack, device: torch.device, *, width: int) -> Trial:
        latents, layout = _videos(pack, device, PATCHES[0])
        volume = CHANNELS * math.prod(PATCHES[0])
        args = (pack.tokens(layout, width), pack.random(device, volume, width), pack.random(device, volume))
        return Trial(Call(linear_unpatchify, "", (*args, layout, PATCHES[0], latents)), _past_the_end(latents))

    for width in sizes.widths:
        yield f"C{width}", partial(build, width=width)


def _past_the_end(latents: RaggedLatents) -> Tensor:
    return torch.arange(latents.flat.numel(), device=latents.flat.device) >= latents.offsets[-1]


def _mlp_activation(sizes: Sizes) -> Family:
    def build(pack: _Pack, device: torch.device, *, width: int, activation: str, gate: str = "first") -> Trial:
        tokens = sum(map(math.prod, pack.sizes.grids))
        x = pack.random(device, tokens, 2, width)[:, 1]
        return Trial(Call(mlp_activation, "", (x, pack.random(device, width), activation), {"gate": gate}))

    for width in sizes.widths:
        for activation in ("gelu", "swiglu"):
            yield f"{activation},H{4 * width}", partial(build, width=4 * width, activation=activation)
    width = 4 * sizes.widths[0]
    yield f"gelu_erf,H{width}", partial(build, width=width, activation="gelu_erf")
    yield f"swiglu,second,H{width}", partial(build, width=width, activation="swiglu", gate="second")


# The ops that have kernels, those first that take longest to compile.
_FAMILIES: Mapping[str, Callable[[Sizes], Family]] = {
    "packed_attention": _attention,
    "qk_norm_rope": _norm_rope,
    "gated_residual_adaln": partial(_modulated, gated_residual_adaln, 2, 3, True, forms=_FORMS["gated_residual_adaln"]),
    "adaln": partial(_modulated, adaln, 1, 2, True, forms=_FORMS["adaln"]),
    "gated_residual": partial(_modulated, gated_residual, 2, 1, False, forms=_FORMS["gated_residual"]),
    "patch_embed": _patch_embed,
    "linear_unpatchify": _linear_unpatchify,
    "schedule": _schedules,
    "mlp_activation": _mlp_activation,
    "unpatchify": _unpatchify,
}
OPS = tuple(_FAMILIES)
# The order of a patch's numbers that CUDA C++ does not have.
UNCOMPILED = ",hwtc"
# Those that have kernels in CUDA C++, too, and in which dtypes.
COMPILED_OPS: Mapping[str, tuple[torch.dtype, ...]] = {
    "packed_attention": (torch.bfloat16, torch.float16),
    **dict.fromkeys(_library.OPS, KERNEL_DTYPES),
}


def offered(op: str, device: str, *, compiled: Collection[str] | None = None) -> list[Plan]:
    """All plans of an op for a device ("cuda:0"), those of bf16 first: the interpreter multiplies bf16 wrongly.

    compiled: ops whose kernels in CUDA C++ are tried too; None: those that can run, for which the GPU is asked.
    """
    on_gpu = device.startswith("cuda")
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if on_gpu else (torch.float16, torch.float32)
    sizes = COMPILED if on_gpu else INTERPRETED
    found = [plan for dtype in dtypes for plan in plans(op, dtype, sizes)]
    for dtype in dtypes if on_gpu else ():
        tried = "cuda" in backends(op, torch.device(device), dtype) if compiled is None else op in compiled
        if tried and dtype in COMPILED_OPS[op]:
            tried = (plan for plan in plans(op, dtype, HOPPER) if not plan.label.endswith(UNCOMPILED))
            found += [replace(plan, backend="cuda") for plan in tried]
    return list({plan.name: plan for plan in found}.values())


def backends(op: str, device: torch.device, dtype: torch.dtype | None) -> tuple[str, ...]:
    """Whose kernels can be proved on a GPU."""
    if dtype not in COMPILED_OPS.get(op, ()) or not torch.cuda.is_available():
        return ("triton",)
    lacking = _library.missing("cuda") or (op == "packed_attention" and refusal_here(device, dtype))
    return ("triton",) if lacking else ("triton", "cuda")
