"""qk_norm_rope: norm of the heads of queries and keys, then rotation by the token's place in space and time."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sora_fast.ops._checks import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_eps,
    check_layout,
    check_shape,
    once,
)
from sora_fast.ops._dispatch import choose
from sora_fast.ops._modulation import offered
from sora_fast.ops._norm import contiguous
from sora_fast.ops._op import kernels, op
from sora_fast.ops._qk_norm_rope_torch import NormRope
from sora_fast.ops._rope import Rope3D, RopeTable, encoded, encoded_once, split_of, turns
from sora_fast.packing import PackedLayout

NORMS = ("rms", "rms_across_heads", "layer")


def qk_norm_rope(
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    layout: PackedLayout,
    rope: Rope3D | RopeTable | None,
    *,
    norm: str = "rms",
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    positions: Tensor | None = None,
    segment_scale: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Normalise and rotate the queries and keys of every head.

    q: [N, H, D], k: [N, Hk, D], D even, of any strides: slices of a fused QKV projection as they are. H is a multiple
        of Hk (grouped queries). One of them may be None: in cross-attention they have layouts of their own.
    q_weight, k_weight: [D] of RMSNorm over the head; None: no norm. rope: None: no rotation.
    norm: "rms"; "rms_across_heads": one RMSNorm over all heads of a token, with weights [H·D] and [Hk·D]; "layer":
        LayerNorm of every head, with q_bias and k_bias [D] beside the weights.
    positions: [N, 3] fp32, the coordinates (t, h, w) in place of the layout's: fractions, frames by their rate, …
    segment_scale: [S, 3] fp32, factors (t, h, w) of every segment beside those of `rope.scale`, for videos of all sizes
        in one pack; above 0 for NTK-aware scaling (not checked: that would wait for the device).
    Returns (q', k'), of the same shapes, in the dtype of q; computed in fp32; zeros for padding; None for None.
    Differentiable in q, k, both weights and biases, and the tables of a `RopeTable`.
    """
    table, rope = (rope, None) if isinstance(rope, RopeTable) else (None, rope)
    _check(q, k, q_weight, k_weight, q_bias, k_bias, layout, rope, norm, eps)
    if positions is not None:
        _check_positions(positions, layout, rope)
    if segment_scale is not None:
        _check_segment_scale(segment_scale, layout, rope)
    keys_alone = q is None
    if keys_alone:  # are queries alone by another name
        q, k, q_weight, k_weight, q_bias, k_bias = k, None, k_weight, None, k_bias, None
    if table is not None:
        _check_table(q, k, table.cos, table.sin)
    rotation = (encoded if torch.compiler.is_compiling() else encoded_once)(rope, q.shape[2])
    coords = layout.coords if positions is None else positions
    if choose("qk_norm_rope", backend, q.device, offered(q), q.dtype) == "torch":
        turn = _turn(table, (layout.segment_ids, coords, layout.grids, segment_scale, *rotation))
        shared = (layout.segment_ids, *turn, norm, eps)
        q_out = NormRope.apply(q, q_weight, q_bias, *shared)
        k_out = None if k is None else NormRope.apply(k, k_weight, k_bias, *shared)
    else:
        grids = layout.grids if rotation.has_extent else None
        places = layout.segment_ids.contiguous(), coords.contiguous(), contiguous(grids), contiguous(segment_scale)
        tables = (None, None)
        if table is not None:
            tables, rotation = (table.cos, table.sin), rotation._replace(interleaved=table.interleaved)
        biases = contiguous(q_bias), contiguous(k_bias)
        q_out, k_out = _qk_norm_rope(q, k, q_weight, k_weight, *biases, *tables, *places, *rotation, norm, eps)
    return (None, q_out) if keys_alone else (q_out, None if k is None else k_out)


def _turn(table: RopeTable | None, angles: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None, bool]:
    """Cosines and sines [N, 1 or H, D/2] of the torch backend, and whether pairs are interleaved. angles: for
    `turns`."""
    if table is not None:
        cos, sin = (x if x.ndim == 3 else x[:, None] for x in (table.cos, table.sin))
        return cos, sin, table.interleaved
    *_, axes, _, interleaved = angles
    cos, sin = turns(*angles)[:, :, None] if axes else (None, None)
    return cos, sin, interleaved


@lru_cache
def _kernel_rotation(axes: tuple[float, ...], ntk: bool, interleaved: bool, scaled: bool) -> Any:
    """The kernels' own form: some logarithms, 7 µs."""
    of = kernels("_rotation").Rotation.of
    return of(split_of(axes), axes[3:6], axes[6:9], axes[9:], ntk, interleaved, scaled=scaled)


def _turning(
    cos: Tensor | None,
    sin: Tensor | None,
    places: tuple[Tensor, Tensor | None, Tensor | None],
    rotation: tuple[Any, ...],
) -> Any:
    """What turns the heads, as the kernels take it. places: coords, grids, segment_scale. rotation: the fields of an
    `Encoded` rope."""
    own = kernels("_rotation")
    axes, ntk, interleaved = rotation
    if cos is not None:
        return own.Turning.by_tables(own.Places.of(*places), cos, sin, interleaved=interleaved)
    turning = _kernel_rotation(tuple(axes), ntk, interleaved, places[2] is not None)
    return own.Turning(turning, own.Places.of(*places))


@op("sora_fast::qk_norm_rope")
def _qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    segment_ids: Tensor,
    coords: Tensor,
    grids: Tensor | None,
    segment_scale: Tensor | None,
    axes: list[float],
    ntk: bool,
    interleaved: bool,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    own = kernels("qk_norm_rope")
    turning = _turning(cos, sin, (coords, grids, segment_scale), (axes, ntk, interleaved))
    q_out, k_out = own.forward(own.Heads(q, k, q_weight, k_weight, q_bias, k_bias), segment_ids, turning, norm, eps)
    return q_out, _no_keys(q) if k_out is None else k_out


@op("sora_fast::qk_norm_rope_backward")
def _qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    segment_ids: Tensor,
    coords: Tensor,
    grids: Tensor | None,
    segment_scale: Tensor | None,
    axes: list[float],
    ntk: bool,
    interleaved: bool,
    norm: str,
    eps: float,
    vectors: bool,  # whether anybody asks for the gradients of weights and biases
    tables: bool,  # and of cosines and sines
) -> list[Tensor]:
    """Gradients of q and of k if it is there, the vectors' in one, and if asked for the tables' in one."""
    own = kernels("qk_norm_rope")
    heads = own.Heads(q, k, q_weight, k_weight, q_bias, k_bias)
    turning = _turning(cos, sin, (coords, grids, segment_scale), (axes, ntk, interleaved))
    d_tables = _d_tables(cos) if tables else None
    grads = own.backward((dq, dk), heads, segment_ids, turning, norm, eps, sums=vectors, d_tables=d_tables)
    return [grad for grad in (*grads, d_tables) if grad is not None]


def _no_keys(q: Tensor) -> Tensor:
    """[N, 0, D]: a custom op returns no None."""
    return q.new_empty((q.shape[0], 0, q.shape[2]))


def _d_tables(cos: Tensor) -> Tensor:
    """[2, N, H or 1, D/2] fp32, room for the gradients of cosines and sines."""
    heads = cos.shape[1] if cos.ndim == 3 else 1
    return cos.new_empty((2, cos.shape[0], heads, cos.shape[-1]), dtype=torch.float32)


@_qk_norm_rope.register_fake
def _(q: Tensor, k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _no_keys(q) if k is None else k.new_empty(k.shape)


@_qk_norm_rope_backward.register_fake
def _(dq: Tensor, dk: Tensor | None, *args: Any) -> list[Tensor]:
    (q, k, *vectors, cos), (norm, _, wanted, tables) = args[:7], args[-4:]
    *_, q_bias, k_bias = vectors
    count = (1 if k is None else 2) * (1 if q_bias is None and k_bias is None else 2) * wanted
    together = norm == "rms_across_heads" and any(vector is not None for vector in vectors)
    sums = q.new_empty((count, *(q.shape[1:] if together else q.shape[2:])), dtype=torch.float32)
    grads = [x.new_empty(x.shape) for x in (q, k) if x is not None]
    return [*grads, sums, _d_tables(cos)] if tables else [*grads, sums]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:12])
    ctx.options = inputs[12:]


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    saved, needed = ctx.saved_tensors, ctx.needs_input_grad  # once: to unpack twelve tensors takes 5 µs
    _, k, *vectors, cos, sin = saved[:8]
    wanted = any(needed[2:6]), any(needed[6:8])
    grads = _qk_norm_rope_backward(dq, None if k is None else dk, *saved, *ctx.options, *wanted)
    sides = 1 if k is None else 2
    sums, *d_tables = grads[sides:]
    d_vectors = (
        _of_vector(sums[place * sides // 2], vector) if needed[2 + place] else None
        for place, vector in enumerate(vectors)
    )
    d_turn = (None, None)
    if d_tables:
        d_turn = (x.view(like.shape).to(like.dtype) for x, like in zip(d_tables[0], (cos, sin), strict=True))
    return grads[0], None if k is None else grads[1], *d_vectors, *d_turn, *[None] * 9


def _of_vector(total: Tensor, vector: Tensor) -> Tensor:
    """The gradient of a weight or bias from its sum: [D], or [H, D], of which keys may have fewer heads."""
    total = total if total.ndim == 1 else total.flatten()[: len(vector)]
    return total if total.dtype == vector.dtype else total.to(vector.dtype)  # even for nothing, it takes 1 µs


_qk_norm_rope.register_autograd(_backward, setup_context=_save)


@once
def _check(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    layout: PackedLayout,
    rope: Rope3D | None,
    norm: str,
    eps: float,
) -> None:
    check_layout(layout)
    if rope is not None and not isinstance(rope, Rope3D):
        raise TypeError(f"rope: {type(rope).__name__}; it must be a Rope3D, a RopeTable or None")
    if norm not in NORMS:
        raise ValueError(f'norm: {norm!r}; it must be "rms", "rms_across_heads" or "layer"')
    _check_heads(q, k, layout)
    for name, heads, weight, bias in (("q", q, q_weight, q_bias), ("k", k, k_weight, k_bias)):
        if heads is None and (weight is not None or bias is not None):
            raise ValueError(f"{name}_weight, {name}_bias: given without {name}; they must be None")
        if (bias is not None) != (norm == "layer" and weight is not None):
            needed = 'with a weight and norm="layer" there must be one (zeros for none), and else it must be None'
            raise ValueError(f"{name}_bias: {'None' if bias is None else 'given'}; {needed}")
        for part, vector in (("weight", weight), ("bias", bias)):
            if vector is not None:
                channels = heads.shape[1] * heads.shape[2] if norm == "rms_across_heads" else heads.shape[2]
                check_shape(f"{name}_{part}", vector, [channels])
                check_dtype(f"{name}_{part}", vector, FLOAT_DTYPES)
                check_device(f"{name}_{part}", vector, name, heads.device)
    if rope is not None:
        rope.split_for((k if q is None else q).shape[2])
    check_eps(eps)


def _check_heads(q: Tensor | None, k: Tensor | None, layout: PackedLayout) -> None:
    if q is None and k is None:
        raise ValueError("q, k: both None; at least one must be given")
    first, heads = ("k", k) if q is None else ("q", q)
    check_shape(first, heads, [layout.capacity, "H", "D"])
    if heads.shape[2] % 2 or heads.shape[2] == 0:
        raise ValueError(f"{first}: head dim {heads.shape[2]}; it must be even")
    check_dtype(first, heads, FLOAT_DTYPES)
    check_device(first, heads, "the layout", layout.device)
    if q is not None and k is not None:
        check_shape("k", k, [layout.capacity, "Hk", q.shape[2]])
        if q.shape[1] != k.shape[1] and (0 in (q.shape[1], k.shape[1]) or q.shape[1] % k.shape[1]):
            raise ValueError(f"k: {k.shape[1]} heads; they must divide the {q.shape[1]} of q")
        check_dtype("k", k, [q.dtype])
        check_device("k", k, "q", q.device)


@once
def _check_table(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    for name, table in (("rope.cos", cos), ("rope.sin", sin)):
        by_head = isinstance(table, Tensor) and table.ndim == 3
        check_shape(name, table, [q.shape[0], *([q.shape[1]] if by_head else []), q.shape[2] // 2])
        check_dtype(name, table, [torch.float32, torch.promote_types(q.dtype, torch.float32)])
        check_device(name, table, "q and k", q.device)
        if by_head and k is not None and k.shape[1] != q.shape[1]:
            raise ValueError(f"{name}: {q.shape[1]} heads; k has {k.shape[1]}, and must have as many")
    if cos.shape != sin.shape:
        raise ValueError(f"rope.sin: shape {tuple(sin.shape)}; it must be that of rope.cos, {tuple(cos.shape)}")


def _check_positions(positions: Tensor, layout: PackedLayout, rope: Rope3D | None) -> None:
    if rope is None:
        raise ValueError(
            "positions: given without a rope of coordinates; they must be None, since nothing turns by them"
        )
    check_shape("positions", positions, [layout.capacity, 3])
    _check_undifferentiated("positions", positions, layout)


def _check_segment_scale(scale: Tensor, layout: PackedLayout, rope: Rope3D | None) -> None:
    if rope is None:
        raise ValueError(
            "segment_scale: given without a rope of coordinates; it must be None, since nothing turns by it"
        )
    check_shape("segment_scale", scale, [layout.max_segments, 3])
    _check_undifferentiated("segment_scale", scale, layout)


def _check_undifferentiated(name: str, tensor: Tensor, layout: PackedLayout) -> None:
    check_dtype(name, tensor, [torch.float32])
    check_device(name, tensor, "the layout", layout.device)
    if tensor.requires_grad:
        raise ValueError(f"{name}: requires a gradient; it must be detached, since it gets none")
