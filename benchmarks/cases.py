"""The work that is measured: per op, a few calls at representative sizes. To add an op, add a function and list it.

The same cases are compiled ahead of time (benchmarks/aot.py), walked through by compute-sanitizer and, at the sizes
of benchmarks/grid.py, timed.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.shapes import PACKS, Grid
from sora_fast import use_backend
from sora_fast.kernels._attention_config import ONE_PASS
from sora_fast.kernels._launch import recording
from sora_fast.masks import SpacetimeMask
from sora_fast.nn import BlockContext, DiTBlock
from sora_fast.ops import (
    FactorisedPosition,
    Rope3D,
    RopeTable,
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
from sora_fast.packing import Conditioning, JointLayout, PackedLayout, RaggedLatents, RowIndex, frame_tokens
from sora_fast.proof.calls import Call, adaln_pair_of, form_of
from sora_fast.proof.cases import schedule
from sora_fast.schedule import TileSchedule

# A latent of 16 channels in patches of 1×2×2, as the Sora-like models with a modern video autoencoder have it.
CHANNELS, PATCH = 16, (1, 2, 2)
# The smallest patch in use, and about the largest: of raw pixels.
OTHER_PATCHES = ((4, (1, 1, 1)), (3, (4, 16, 16)))
# One of every shape that attention splits a head into, up to the widest, and the commonest of each.
HEAD_DIMS = (64, 72, 80, 96, 128, 192, 256)
_ROPES = {"": Rope3D(), "half-split,": Rope3D(interleaved=False)}
# All at once that an angle may depend on, with a scale for every segment.
_SCALED = Rope3D(scaling="ntk", extent=(None, 32.0, 32.0))


@dataclass(frozen=True, eq=False)
class Setting:
    """How large the cases are, and where their tensors live."""

    device: torch.device
    dtype: torch.dtype
    grids: tuple[Grid, ...]  # token grids of the batch: videos and images mixed
    widths: tuple[int, ...]
    head_dims: tuple[int, ...]
    heads: int
    clean: bool = False  # the first frame of every video is given, as in image to video: a row of its own
    order: str = "tiled"  # of the tokens that patches become

    @staticmethod
    def ahead_of_time() -> "Setting":
        """Tiny tensors, every width and head dim that the kernels are built for."""
        grids = ((4, 8, 8), (1, 8, 16), (2, 8, 8))
        return Setting(torch.device("cpu"), torch.bfloat16, grids, (384, 1152, 3072, 5120), HEAD_DIMS, 2)

    @staticmethod
    def small(device: torch.device) -> "Setting":
        """A walk through every case in seconds, even interpreted."""
        return Setting(device, torch.float32, PACKS["tiny"].grids, (64,), (64,), 2)

    def layout(self, **options: Any) -> PackedLayout:
        """The batch, laid out."""
        return PackedLayout.from_grids(self.grids, device=self.device, **options)

    def rows(self, layout: PackedLayout) -> RowIndex:
        """One modulation row a segment, or two."""
        sigma = torch.rand(layout.max_segments, device=self.device)
        if not self.clean:
            return Conditioning.per_segment(sigma, layout).rows
        first = (layout.coords[:, 0] == 0) & (layout.segment_ids >= 0)
        return Conditioning.with_clean(sigma, first, layout).rows

    def random(self, *shape: int) -> Tensor:
        """Normal random numbers."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)


@dataclass(frozen=True, eq=False)
class Case(Call):
    """A call that is measured.

    bytes_moved, flops: (forward, backward), the least that any implementation must do; zeros where that is not what
    limits the op. share: the truth is computed for one head in so many, which has nothing to do with the others; 1:
    for everything.
    """

    bytes_moved: tuple[int, int] = (0, 0)
    flops: tuple[int, int] = (0, 0)
    share: int = 1

    def part(self, x: Tensor) -> Tensor:
        """What the truth is computed of, of an argument, an output or a gradient."""
        return x if self.share == 1 else x[:, : x.shape[1] // self.share]

    def exact(self) -> "Case":
        """The same work on the same numbers in fp64, on a part of the heads if `share` says so."""
        args = tuple(self.part(a) if isinstance(a, Tensor) else a for a in self.args)
        return Call.exact(replace(self, args=args, share=1))

    def has_kernels(self) -> bool:
        """True if the op launches Triton kernels here."""
        with recording((9, 0)) as recorder, use_backend("triton"):
            self.forward()
        return bool(recorder.launches)


class OnePassCase(Case):
    """Attention whose backward pass takes the one-pass form, whichever the configuration table prefers."""

    def backward(self, outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with one_pass_backward():
            return super().backward(outputs, gradients)


def one_pass_backward() -> AbstractContextManager[Any]:
    """Inside, attention's backward pass takes the one-pass form, unless it must be deterministic."""
    return patch.dict(ONE_PASS, dict.fromkeys(ONE_PASS, 256))


def all_cases(setting: Setting) -> Iterator[Case]:
    """Every case of every op, one at a time, so that only one case's tensors are alive."""
    families = (
        modulation_cases,
        qk_norm_rope_cases,
        schedule_cases,
        attention_cases,
        patch_cases,
        final_layer_cases,
        mlp_activation_cases,
        segment_mean_cases,
    )
    for cases in families:
        yield from cases(setting)


def modulation(s: Setting, width: int) -> dict[str, Case]:
    """A case of each of the ops that modulate tokens, by its name."""
    layout = s.layout()
    rows = s.rows(layout)
    x, branch = (s.random(layout.capacity, width) for _ in range(2))
    shift, scale, gate = (s.random(rows.num_rows, width) for _ in range(3))
    label, once = f"C{width}", x.nbytes
    cases = (
        Case(adaln, label, (x, shift, scale, rows), bytes_moved=(2 * once, 3 * once)),
        Case(gated_residual, label, (x, branch, gate, rows), bytes_moved=(3 * once, 3 * once)),
        Case(gated_residual_adaln, label, (x, branch, gate, shift, scale, rows), bytes_moved=(4 * once, 6 * once)),
    )
    return {case.op.__name__: case for case in cases}


def modulation_cases(s: Setting) -> Iterator[Case]:
    for width in s.widths:
        cases = modulation(s, width)
        yield from cases.values()
        yield _with_affine(cases["adaln"], "layer")
        yield _with_affine(cases["gated_residual_adaln"], "rms")
        yield from _modulation_variants(s, width)
    yield from _without_tables(s, s.widths[-1])


def _modulation_variants(s: Setting, width: int) -> Iterator[Case]:
    """Forms that have kernels of their own."""
    cases = modulation(s, width)
    x, shift, scale, rows = cases["adaln"].args
    others = [s.random(*table.shape) for table in (shift, scale)]
    yield Case(
        adaln_pair_of, f"pair,C{width}", (x, shift, scale, *others, rows), bytes_moved=(3 * x.nbytes, 4 * x.nbytes)
    )
    case = cases["gated_residual"]
    yield replace(case, op=form_of(gated_residual, branch_norm="rms"), label=f"rms branch,{case.label}")


def _without_tables(s: Setting, width: int) -> Iterator[Case]:
    """Forms that leave a table out."""
    cases = modulation(s, width)
    for op, label, absent, moved in (
        (adaln, "no shift", (1,), (2, 3)),
        (adaln, "norm alone", (1, 2), (2, 3)),
        (gated_residual, "no gate", (2,), (3, 2)),
        (gated_residual_adaln, "no gate", (2,), (4, 4)),
    ):
        case = cases[op.__name__]
        args = tuple(argument for place, argument in enumerate(case.args) if place not in absent)
        moved = tuple(times * args[0].nbytes for times in moved)
        yield Case(form_of(op, *absent), f"{label},{case.label}", args, bytes_moved=moved)


def _with_affine(case: Case, norm: str) -> Case:
    """The same work with a norm that has a weight and a bias; they move no bytes to speak of."""

    @wraps(case.op)
    def op(*args: Any) -> Any:
        *tensors, weight, bias = args
        return op.__wrapped__(*tensors, norm=norm, weight=weight, bias=bias)

    vectors = torch.randn(2, case.args[0].shape[1]).to(case.args[0]).unbind()
    return replace(case, op=op, label=f"{norm},affine,{case.label}", args=(*case.args, *vectors))


def qk_norm_rope_cases(s: Setting) -> Iterator[Case]:
    layout = s.layout()
    work = [(head_dim, label, rope) for head_dim in s.head_dims for label, rope in _ROPES.items()]
    for head_dim, label, rope in [*work, (s.head_dims[-1], "scaled,", _SCALED)]:
        q, k, _ = s.random(layout.capacity, 3, s.heads, head_dim).unbind(1)
        weights = s.random(head_dim), s.random(head_dim)
        once = q.numel() * q.element_size()
        scale = torch.full(layout.grids.shape, 0.5, device=s.device) if rope is _SCALED else None
        args, options = (q, k, *weights, layout, rope), {"segment_scale": scale}
        yield Case(qk_norm_rope, f"{label}D{head_dim}", args, options, bytes_moved=(4 * once, 6 * once))
    yield from (norm_rope_form(s, layout, form) for form in NORM_ROPE_FORMS)


@dataclass(frozen=True)
class NormRopeForm:
    """What a model does to its queries and keys. table: by the cosines and sines of "tokens" or of "heads"; learned:
    they want gradients. alone: queries without keys, as in cross-attention."""

    model: str
    heads: int
    head_dim: int
    norm: str
    table: str = ""
    learned: bool = False
    alone: bool = False


# By the models' own widths: the norm over all heads holds a token on chip, and 5,120 channels are the most in use.
NORM_ROPE_FORMS = (
    NormRopeForm("Wan 14B", 40, 128, "rms_across_heads"),
    NormRopeForm("Wan 1.3B, queries alone", 12, 128, "rms_across_heads", alone=True),
    NormRopeForm("LTX", 32, 64, "rms_across_heads", "heads"),
    NormRopeForm("CogVideoX", 30, 64, "layer", "tokens"),
    NormRopeForm("Mochi", 24, 128, "rms", "heads", learned=True),
    NormRopeForm("half-split, learned", 16, 72, "rms", "tokens", learned=True),
)


def norm_rope_form(s: Setting, layout: PackedLayout, form: NormRopeForm) -> Case:
    """All tensors that want gradients come first."""
    q, k, _ = s.random(layout.capacity, 3, form.heads, form.head_dim).unbind(1)
    sides = 1 if form.alone else 2
    channels = form.head_dim * (form.heads if form.norm == "rms_across_heads" else 1)
    vectors = s.random(sides * (2 if form.norm == "layer" else 1), channels).unbind()
    by_head = [form.heads] if form.table == "heads" else []
    table = (
        torch.randn(2, layout.capacity, *by_head, form.head_dim // 2, device=s.device).unbind() if form.table else ()
    )
    given = (*(q, k)[:sides], *vectors, *(table if form.learned else ()))
    interleaved = not form.model.startswith("half-split")

    @wraps(qk_norm_rope)
    def op(*tensors: Tensor, backend: str | None = None) -> Any:
        q, k = tensors[0], None if form.alone else tensors[1]
        *vectors, cos, sin = (*tensors[sides:], *(() if form.learned else table or (None, None)))
        q_weight, k_weight, q_bias, k_bias = (*vectors, *[None] * 4)[:4]
        rope = Rope3D() if cos is None else RopeTable(cos, sin, interleaved)
        options = {"norm": form.norm, "q_bias": q_bias, "k_bias": k_bias, "backend": backend}
        result = qk_norm_rope(q, k, q_weight, k_weight, layout, rope, **options)
        return result[0] if form.alone else result

    once, tables = sides * q.numel() * q.element_size(), sum(x.nbytes for x in table)
    moved = (2 * once + tables, 3 * once + tables * (2 if form.learned else 1))
    return Case(op, f"{form.model},{form.heads}×D{form.head_dim}", given, bytes_moved=moved)


# Causal masks have a way of their own in raster order; a tiled one serves the windows.
MASKS = {
    "full": SpacetimeMask.full(),
    "frame_causal": SpacetimeMask.frame_causal(),
    "token_causal": SpacetimeMask.token_causal(),
    "window": SpacetimeMask.window(2, 6, 6),
}


def schedule_cases(s: Setting) -> Iterator[Case]:
    yield from (schedule_case(s, name, mask) for name, mask in MASKS.items())
    joint, mask = _joint(s, MASKS["window"]), SpacetimeMask.token_causal()  # which has lists in both of these
    yield Case(schedule, "joint,token_causal", (joint, mask), bytes_moved=(12 * joint.capacity, 0))
    new, held = _last_frames(s)
    moved = 8 * new.capacity + 4 * held.capacity
    yield Case(schedule, "cached,token_causal", (new, mask), {"kv_layout": held}, bytes_moved=(moved, 0))


def schedule_case(s: Setting, label: str, mask: SpacetimeMask) -> Case:
    """The schedule of the batch under a mask; what it writes once is the least that moves."""
    layout = _layout(s, mask)
    return Case(schedule, label, (layout, mask), bytes_moved=(12 * layout.capacity, 0))


def _layout(s: Setting, mask: SpacetimeMask) -> PackedLayout:
    return s.layout() if mask.sees_past else s.layout(order="tiled", for_mask=mask)


def _joint(s: Setting, mask: SpacetimeMask) -> PackedLayout:
    """The batch beside its texts, laid out for a mask."""
    text = PackedLayout.from_grids([(77, 1, 1)] * len(s.grids), device=s.device)
    return JointLayout.build(text, _layout(s, mask)).layout


def _last_frames(s: Setting) -> tuple[PackedLayout, PackedLayout]:
    """The last frame of every video, and all of its frames."""
    keep = [frame_tokens(grid, grid[0] - 1, grid[0]) for grid in s.grids]
    return s.layout(keep=keep), s.layout()


def attention_cases(s: Setting) -> Iterator[Case]:
    text = PackedLayout.from_grids([(77, 1, 1)] * len(s.grids), device=s.device)
    for head_dim in s.head_dims:
        for name, mask in MASKS.items():
            yield self_attention(s, head_dim, name, mask)
        for name in ("full", "frame_causal", "window"):
            yield self_attention(s, head_dim, f"{name},one pass", MASKS[name], case=OnePassCase)
        for case in (Case, OnePassCase):
            label = "window,grouped" + ",one pass" * (case is OnePassCase)
            yield self_attention(s, head_dim, label, MASKS["window"], case=case, group=2)
        layout = s.layout(order="tiled")
        q = s.random(layout.capacity, s.heads, head_dim)
        k, v = s.random(text.capacity, 2, s.heads, head_dim).unbind(1)
        work = _products(77 * layout.capacity, q)
        args, options = (q, k, v, layout, _built(layout, None, kv_layout=text)), {"kv_layout": text}
        yield Case(packed_attention, f"cross,D{head_dim}", args, options, flops=work, share=s.heads)
    yield joint_attention(s, s.head_dims[0])
    yield cached_attention(s, s.head_dims[0])


def joint_attention(s: Setting, head_dim: int) -> Case:
    """Texts and videos in one sequence, under a window over the videos."""
    mask = MASKS["window"]
    layout = _joint(s, mask)
    q, k, v = s.random(layout.capacity, 3, s.heads, head_dim).unbind(1)
    pairs = sum(mask.pairs(grid) + 77 * (77 + 2 * math.prod(grid)) for grid in s.grids)
    args = (q, k, v, layout, _built(layout, mask))
    return Case(packed_attention, f"joint,window,D{head_dim}", args, flops=_products(pairs, q), share=s.heads)


def cached_attention(s: Setting, head_dim: int) -> Case:
    """The last frame of every video over all of its frames."""
    mask, (new, held) = MASKS["frame_causal"], _last_frames(s)
    q = s.random(new.capacity, s.heads, head_dim)
    k, v = s.random(held.capacity, 2, s.heads, head_dim).unbind(1)
    pairs = sum(math.prod(grid) * math.prod(grid[1:]) for grid in s.grids)
    args, options = (q, k, v, new, _built(new, mask, kv_layout=held)), {"kv_layout": held}
    label = f"cached,frame_causal,D{head_dim}"
    return Case(packed_attention, label, args, options, flops=_products(pairs, q), share=s.heads)


def self_attention(
    s: Setting, head_dim: int, label: str, mask: SpacetimeMask, *, case: type[Case] = Case, group: int = 1
) -> Case:
    """Attention of the batch to itself. group: query heads that share one of keys and values."""
    layout = _layout(s, mask)
    q, k = (s.random(layout.capacity, heads, head_dim) for heads in (s.heads, s.heads // group))
    v = s.random(layout.capacity, 3, k.shape[1], head_dim)[:, 2]  # as it comes out of a fused projection
    args = (q, k, v, layout, _built(layout, mask))
    work = _products(sum(map(mask.pairs, s.grids)), q)
    options = {"deterministic": False}
    return case(packed_attention, f"{label},D{head_dim}", args, options, flops=work, share=s.heads // group)


def _built(*args: Any, **options: Any) -> TileSchedule:
    """A schedule is shared by a model's layers, so its building is no part of a case, whoever asks for a backend."""
    with use_backend("torch"):
        return TileSchedule.build(*args, **options)


def _products(pairs: int, q: Tensor) -> tuple[int, int]:
    """FLOPs of the two matrix products forward, and of the five backward, the recomputed scores included."""
    product = 2 * pairs * q.shape[1] * q.shape[2]
    return 2 * product, 5 * product


def patch_cases(s: Setting) -> Iterator[Case]:
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
        args, moved = (tokens, layout, patch_size, latents), (2 * tokens.nbytes, 2 * tokens.nbytes)
        case = Case(unpatchify, f"K{tokens.shape[1]}", args, bytes_moved=moved)
        yield case
        for order in ("cthw", "hwtc") if patch_size == PATCH else ():
            yield replace(case, label=f"{order},{case.label}", options={"order": order})


def _latents(s: Setting, channels: int, patch_size: Grid) -> tuple[RaggedLatents, PackedLayout]:
    sizes = [[size * p for size, p in zip(grid, patch_size, strict=True)] for grid in s.grids]
    return RaggedLatents.from_list([s.random(channels, *size) for size in sizes]), s.layout(order=s.order)


def _patch_embed(s: Setting, width: int, channels: int = CHANNELS, patch_size: Grid = PATCH) -> Case:
    latents, layout = _latents(s, channels, patch_size)
    volume = channels * math.prod(patch_size)
    args = (latents, s.random(width, volume), s.random(width), layout, patch_size)
    once = (volume + width) * layout.capacity * latents.flat.element_size()
    label = f"C{width}" if patch_size == PATCH else f"K{volume},C{width}"
    # Few pixels are bound by memory, and hundreds by the product.
    flops = 2 * volume * width * layout.capacity if volume > 1024 else 0
    return Case(patch_embed, label, args, bytes_moved=(once, once), flops=(flops, flops))


def final_layer_cases(s: Setting) -> Iterator[Case]:
    for width in s.widths:
        latents, layout = _latents(s, CHANNELS, PATCH)
        volume = CHANNELS * math.prod(PATCH)
        x, weight, bias = s.random(layout.capacity, width), s.random(volume, width), s.random(volume)
        once = x.nbytes + latents.flat.nbytes
        args = (x, weight, bias, layout, PATCH, latents)
        yield Case(linear_unpatchify, f"C{width}", args, bytes_moved=(once, once + x.nbytes))


def mlp_activation_cases(s: Setting) -> Iterator[Case]:
    tokens = s.layout().capacity
    for width in s.widths:
        for activation, kept in (("gelu", 1.0), ("swiglu", 0.5)):
            x, bias = s.random(tokens, 4 * width), s.random(4 * width)
            moved = (int((1 + kept) * x.nbytes), int((2 + kept) * x.nbytes))
            yield Case(mlp_activation, f"{activation},H{4 * width}", (x, bias, activation), bytes_moved=moved)
    x, bias = s.random(tokens, 4 * s.widths[-1]), s.random(4 * s.widths[-1])
    moved = (2 * x.nbytes, 3 * x.nbytes)
    yield Case(mlp_activation, f"gelu_erf,H{len(bias)}", (x, bias, "gelu_erf"), bytes_moved=moved)
    moved = (x.nbytes * 3 // 2, x.nbytes * 5 // 2)
    args, label = (x, bias, "swiglu"), f"swiglu,second,H{len(bias)}"
    yield Case(mlp_activation, label, args, {"gate": "second"}, bytes_moved=moved)


def dit_block_case(s: Setting) -> Case:
    """A whole block in full attention, with a gradient for every parameter and table."""
    dim, layout = s.widths[0], s.layout()
    block = DiTBlock(dim, s.heads, rope=Rope3D()).to(s.device, s.dtype)
    names = [name for name, _ in block.named_parameters() if not name.startswith("adaLN")]
    options = {"block": block, "names": names, "shared": BlockContext(layout, _built(layout), s.rows(layout))}
    tables = [s.random(layout.max_segments, dim) for _ in range(6)]
    # Products of unit size, so that 16 bits are not lost in the gates.
    parameters = [s.random(*block.get_parameter(name).shape) / dim**0.5 for name in names]
    args = (s.random(layout.capacity, dim), s.random(layout.capacity, dim), *tables, *parameters)
    products, pairs = 24 * layout.capacity * dim**2, sum(math.prod(grid) ** 2 for grid in s.grids)
    flops = (products + 4 * pairs * dim, 2 * products + 10 * pairs * dim)
    return Case(dit_block, f"C{dim}", args, options, flops=flops)


def dit_block(
    x: Tensor, h: Tensor, *tensors: Tensor, block: DiTBlock, names: Sequence[str], shared: BlockContext
) -> tuple[Tensor, Tensor]:
    """tensors: the block's tables but for the first two, which made h, the two of the layer that follows, and its
    parameters by `names`.
    """
    parameters = dict(zip(names, tensors[6:], strict=True))
    inputs = (x, h, (None, None, *tensors[:4]), tensors[4:6], shared)
    return torch.func.functional_call(block, parameters, inputs)


def segment_mean_cases(s: Setting) -> Iterator[Case]:
    layout = s.layout()
    for width in s.widths:
        x = s.random(layout.capacity, width)
        yield Case(segment_mean, f"C{width}", (x, layout), bytes_moved=(x.nbytes, x.nbytes))
