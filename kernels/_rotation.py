"""How pairs of channels turn: by angles computed from a token's place, or by given cosines and sines."""

import math
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._attention_operands import Rows


@dataclass(frozen=True)
class Rotation:
    """How pairs of channels turn; a compile-time constant. Tuples hold one entry an axis (t, h, w); all are empty if
    no angle is computed.

    ends: pairs before the end of the axis.
    octaves, rests: octaves from one pair to the next slower one: 14 bits of fraction first, so that their product with
        a pair's number is exact, then the rest.
    speeds: radians of the first pair for one step of the coordinate.
    lifts: octaves, in those of the segment's scale, that each pair is faster than the one before; zeros: the scale is
        one of the coordinate.
    extents: length of a side in steps, however many tokens it has; 0: a token is a step.
    scaled: segments have a scale.
    interleaved: a pair is the channels (2p, 2p + 1), or else (p, p + D/2).
    table: the unit of the strides of given cosines and sines; 0: none are given. by_head: each head has its own.
    """

    ends: tuple[int, ...] = ()
    octaves: tuple[float, ...] = ()
    rests: tuple[float, ...] = ()
    speeds: tuple[float, ...] = ()
    lifts: tuple[float, ...] = ()
    extents: tuple[float, ...] = ()
    scaled: bool = False
    interleaved: bool = False
    table: int = 0
    by_head: bool = False

    @staticmethod
    def of(
        split: tuple[int, ...],
        theta: tuple[float, ...],
        scale: tuple[float, ...],
        extent: tuple[float, ...],
        ntk: bool,
        interleaved: bool,
        *,
        scaled: bool,
    ) -> "Rotation":
        """The fields of a `Rope3D`, spelled out for every axis; none of them: no angle is computed."""
        ends, octaves, lifts = [], [], []
        for size, base, factor in zip(split, theta, scale, strict=True):
            lift = 2 / max(size - 2, 1) if ntk else 0.0
            ends.append((ends[-1] if ends else 0) + size // 2)
            octaves.append(2 * math.log2(base) / max(size, 1) - (lift * math.log2(factor) if ntk else 0.0))
            lifts.append(lift)
        coarse = tuple(round(step * 2**14) / 2**14 for step in octaves)
        rests = tuple(exact - part for exact, part in zip(octaves, coarse, strict=True))
        speeds = (1.0,) * len(split) if ntk else scale
        return Rotation(tuple(ends), coarse, rests, speeds, tuple(lifts), extent, scaled, interleaved)

    @property
    def turns(self) -> bool:
        """Whether anything does."""
        return len(self.ends) > 0 or self.table > 0

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Kept: every launch asks for it, and it takes longer than the rest of a launch's key."""
        return hash(astuple(self))


class Places(NamedTuple):
    """Where the tokens are: coords [N, 3]; grids [S, 3]; scale [S, 3] fp32 of every segment. All contiguous.

    For grids and a scale that the rotation does not need `coords` stands in: Triton 3.6 lets no tuple hold None.
    """

    coords: Tensor
    grids: Tensor
    scale: Tensor

    @staticmethod
    def of(coords: Tensor, grids: Tensor | None, scale: Tensor | None) -> "Places":
        return Places(coords, coords if grids is None else grids, coords if scale is None else scale)


class Turning(NamedTuple):
    """What turns the heads of a batch. cos, sin: given tables [N, D/2] or [N, H, D/2], of any strides; or None."""

    rotation: Rotation
    places: Places
    cos: Rows | None = None
    sin: Rows | None = None

    @staticmethod
    def by_tables(places: Places, cos: Tensor, sin: Tensor, *, interleaved: bool) -> "Turning":
        pairs, by_head = cos.shape[-1], cos.ndim == 3
        strides = [(x.stride(0), x.stride(1) if by_head else 0, x.stride(-1)) for x in (cos, sin)]
        # As `Shape` has one: 4 numbers of fp32 are 16 bytes. The gradients' strides are multiples of the pairs.
        unit = 4 if all(step % 4 == 0 for token, head, _ in strides for step in (token, head, pairs)) else 1
        rows = [Rows(x, t // unit, h // unit, p) for x, (t, h, p) in zip((cos, sin), strides, strict=True)]
        return Turning(Rotation(interleaved=interleaved, table=unit, by_head=by_head), places, *rows)

    def gradients(self, d_tables: Tensor | None) -> tuple[Rows | None, ...]:
        """Where those of the cosines and the sines go: [2, N, H or 1, D/2] contiguous, or nowhere."""
        if d_tables is None:
            return None, None
        heads, pairs = d_tables.shape[2:]
        steps = heads * pairs // self.rotation.table, pairs // self.rotation.table, 1
        return tuple(Rows(x, *steps) for x in d_tables)


@triton.jit
def rotate(pairs, turn, ROTATION: tl.constexpr):
    a, b = pairs
    cos, sin = turn
    if ROTATION.turns:
        a, b = a * cos - b * sin, a * sin + b * cos
    return a, b


@triton.jit
def turn_gradient(grads, pairs):
    """Gradients of the cosine and the sine, from those of what was turned and from what was there before."""
    da, db = grads
    a, b = pairs
    return da * a + db * b, db * a - da * b


@triton.jit
def shared_turn(places, cos, sin, n, segment, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """Cosine and sine [n, p] that a token's pair turns by in every head; in tables by head there are none."""
    if len(ROTATION.ends) > 0:
        return _cos_sin(_radians(places, n, segment, SHAPE, ROTATION))
    elif ROTATION.table > 0 and not ROTATION.by_head:
        return load_turn(cos, sin, n, 0, segment >= 0, SHAPE, ROTATION)
    else:
        return 1.0, 0.0


@triton.jit
def turn_of(shared, cos, sin, n, head, real, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """Cosine and sine of a head: `shared` by all, or its own."""
    if ROTATION.by_head:
        return load_turn(cos, sin, n, head, real, SHAPE, ROTATION)
    else:
        return shared


@triton.jit
def back(turn):
    """Of the turn the other way."""
    return turn[0], -turn[1]


@triton.jit
def back_of(shared, cos, sin, n, head, real, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """As `turn_of`, back; `shared` is so already, for all heads at once."""
    if ROTATION.by_head:
        return back(load_turn(cos, sin, n, head, real, SHAPE, ROTATION))
    else:
        return shared


@triton.jit
def load_turn(cos, sin, n, head, real, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """Those of given tables, fp32; zeros where not `real`, whatever stands there."""
    mask = real[:, None] & (tl.arange(0, SHAPE.pairs) < SHAPE.dim // 2)[None, :]
    a = tl.load(_table_pointers(cos, n, head, SHAPE, ROTATION), mask=mask, other=0.0)
    b = tl.load(_table_pointers(sin, n, head, SHAPE, ROTATION), mask=mask, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_turn(cos, sin, n, head, exists, turn, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """Their gradients."""
    mask = exists[:, None] & (tl.arange(0, SHAPE.pairs) < SHAPE.dim // 2)[None, :]
    tl.store(_table_pointers(cos, n, head, SHAPE, ROTATION), turn[0], mask=mask)
    tl.store(_table_pointers(sin, n, head, SHAPE, ROTATION), turn[1], mask=mask)


@triton.jit
def _table_pointers(x, n, head, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    start = tl.cast(n, tl.int64) * x.token_stride + tl.cast(head, tl.int64) * x.head_stride
    pair = tl.arange(0, SHAPE.pairs).to(tl.int64)
    return x.data + (start * ROTATION.table)[:, None] + (pair * x.dim_stride)[None, :]


@triton.jit
def _radians(places, n, segment, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """The angle [n, p] that a token's pair turns by."""
    t, t_lift = _coordinate(places, n, segment, 0, ROTATION)
    h, h_lift = _coordinate(places, n, segment, 1, ROTATION)
    w, w_lift = _coordinate(places, n, segment, 2, ROTATION)
    pair = tl.arange(0, SHAPE.pairs)
    in_t, in_h = pair < ROTATION.ends[0], pair < ROTATION.ends[1]
    number = (pair - _of_axis(in_t, in_h, 0, ROTATION.ends[0], ROTATION.ends[1])).to(tl.float32)
    octaves = number * _of_axis(in_t, in_h, ROTATION.octaves[0], ROTATION.octaves[1], ROTATION.octaves[2])
    rest = number * _of_axis(in_t, in_h, ROTATION.rests[0], ROTATION.rests[1], ROTATION.rests[2])
    # Whole octaves apart: the rounding of a large exponent would be an error of the angle.
    whole = tl.floor(octaves)
    speed = tl.exp2(-whole) * tl.exp2(whole - octaves - rest)
    in_t, in_h = in_t[None, :], in_h[None, :]
    radians = _of_axis(in_t, in_h, t, h, w) * speed[None, :]
    if ROTATION.scaled and ROTATION.lifts[0] > 0:
        radians *= tl.exp2(number[None, :] * _of_axis(in_t, in_h, t_lift, h_lift, w_lift))
    return radians


@triton.jit
def _of_axis(in_t, in_h, t, h, w):
    return tl.where(in_t, t, tl.where(in_h, h, w))


@triton.jit
def _coordinate(places, n, segment, AXIS: tl.constexpr, ROTATION: tl.constexpr):
    """Radians [n, 1] that the first pair of an axis turns by, and the octaves that each further pair is faster by."""
    used = segment >= 0
    step = tl.load(places.coords + n.to(tl.int64) * 3 + AXIS, mask=used, other=0).to(tl.float32)
    step *= ROTATION.speeds[AXIS]
    lift = tl.zeros_like(step)
    if ROTATION.extents[AXIS] != 0:
        side = tl.load(places.grids + segment * 3 + AXIS, mask=used, other=1)
        step *= ROTATION.extents[AXIS] / side
    if ROTATION.scaled:
        scale = tl.load(places.scale + segment * 3 + AXIS, mask=used, other=1.0)
        if ROTATION.lifts[AXIS] > 0:
            lift = tl.log2(scale) * ROTATION.lifts[AXIS]
        else:
            step *= scale
    return step[:, None], lift[:, None]


@triton.jit
def _cos_sin(radians):
    """cos and sin, to one unit in the last place up to some 10⁴ radians.

    tl.sin's own reduction of the range, for any argument, takes a stack in memory. This one takes π/2 off in three
    parts, so short that their multiples are exact (Cody and Waite); then Cephes' polynomials for [−π/4, π/4].
    """
    whole = tl.floor(radians * 0.6366197723675814 + 0.5)
    x = radians - whole * 1.5703125
    x -= whole * 4.837512969970703e-4
    x -= whole * 7.549789948768648e-8
    xx = x * x
    sin = x + x * xx * (-1.6666654611e-1 + xx * (8.3321608736e-3 - xx * 1.9515295891e-4))
    cos = 1 - 0.5 * xx + xx * xx * (4.166664568298827e-2 + xx * (-1.388731625493765e-3 + xx * 2.443315711809948e-5))
    quadrant = whole.to(tl.int32) & 3
    swapped = (quadrant & 1) == 1
    turned_cos = tl.where(swapped, sin, cos)
    turned_sin = tl.where(swapped, cos, sin)
    turned_cos = tl.where((quadrant == 1) | (quadrant == 2), -turned_cos, turned_cos)
    return turned_cos, tl.where(quadrant >= 2, -turned_sin, turned_sin)
