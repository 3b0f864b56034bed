"""Blocks of heads' channels, pair by pair: loads, stores, and the norms of what is in them."""

from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._attention_operands import Rows
from sora_fast.kernels._launch import cdiv, next_power_of_two


class Heads(NamedTuple):
    """q [N, H, D], k [N, Hk, D] of any strides, k None for q alone; weights of their norms, or None; of LayerNorm the
    biases [D], contiguous, or None."""

    q: Tensor
    k: Tensor | None
    q_weight: Tensor | None
    k_weight: Tensor | None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None

    @property
    def vectors(self) -> tuple[Any, ...]:
        """Both weights, each with its stride, and both biases."""
        q, k = self.q_weight, self.k_weight
        return q, 1 if q is None else q.stride(0), k, 1 if k is None else k.stride(0), self.q_bias, self.k_bias

    @property
    def counts(self) -> tuple[int, int, int]:
        """N, H, Hk."""
        return self.q.shape[0], self.q.shape[1], 0 if self.k is None else self.k.shape[1]

    @property
    def is_normed(self) -> bool:
        return self.q_weight is not None or self.k_weight is not None

    @property
    def norm(self) -> str:
        """LayerNorm is what has biases."""
        return "rms" if self.q_bias is None and self.k_bias is None else "layer"

    @property
    def sums(self) -> int:
        """Vectors that a backward pass sums: the weights of q and of k, if that is there, and then their biases."""
        sides = 1 if self.k is None else 2
        return 2 * sides if self.norm == "layer" else sides

    def empty(self) -> tuple[Tensor, Tensor | None]:
        """Room for results like q and k, contiguous."""
        return self.q.new_empty(self.q.shape), None if self.k is None else self.k.new_empty(self.k.shape)


@dataclass(frozen=True)
class Shape:
    """What is known of the heads when the kernels are compiled.

    dim: channels of a head. pairs: a power of two that covers its pairs. rows: of a block, each a head of a token.
    unit: strides of tokens and heads are passed in units of so many elements. Triton knows of an integer only whether
        16 divides it: passed as it is, a head stride of 72 would cost the 16-byte loads.
    together: the rows of a block are the heads of one token, and are normed together.
    """

    dim: int
    pairs: int
    rows: int
    unit: int
    together: bool = False

    @staticmethod
    def of(*tensors: Tensor | None, pairs: int = 0, heads: int = 0) -> tuple["Shape", list[Rows | None]]:
        """For all [N, H, D] that a kernel touches, of any strides; and those as it takes them.

        Either blocks of so many `pairs`, of one head of several tokens, or of all `heads` of one token.
        """
        strides = tuple([None if x is None else x.stride() for x in tensors])
        shape, steps = _shape(tensors[0].shape[2], pairs, heads, strides)
        return shape, [None if x is None else Rows(x, *step) for x, step in zip(tensors, steps, strict=True)]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Kept: every launch asks for it."""
        return hash(astuple(self))

    def programs(self, x: Tensor) -> int:
        """How many blocks cover the tokens of x [N, H, D]."""
        return cdiv(x.shape[0], self.rows)


@lru_cache
def _shape(
    dim: int, pairs: int, heads: int, strides: tuple[tuple[int, ...] | None, ...]
) -> tuple[Shape, list[tuple[int, ...]]]:
    """And the strides in its units."""
    given = [stride or (0, 0, 0) for stride in strides]
    width = next_power_of_two(dim // 2)
    unit = 8 if all(stride % 8 == 0 for token, head, _ in given for stride in (token, head)) else 1
    rows = next_power_of_two(heads) if heads else max(1, pairs // width)
    return Shape(dim, width, rows, unit, heads > 0), [
        (token // unit, head // unit, step) for token, head, step in given
    ]


@triton.jit
def pair_channels(SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """The two channels [p] of every pair, and which pairs there are."""
    pair = tl.arange(0, SHAPE.pairs)
    first = 2 * pair if ROTATION.interleaved else pair
    second = first + 1 if ROTATION.interleaved else pair + SHAPE.dim // 2
    return first, second, pair < SHAPE.dim // 2


@triton.jit
def _pointers(x, n, head, channel, SHAPE: tl.constexpr):
    # 64 bits along the head too: stored as [D, H, N], its channels lie far apart.
    start = tl.cast(n, tl.int64) * x.token_stride + tl.cast(head, tl.int64) * x.head_stride
    return x.data + (start * SHAPE.unit)[:, None] + (channel.to(tl.int64) * x.dim_stride)[None, :]


@triton.jit
def load(x, n, head, real, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """Both channels [row, p] of the pairs of some heads, fp32; zeros where not `real` [row], whatever stands there.

    n, head: of every row; one of them may be the same for all. x: None: zeros, and nothing is computed of them.
    """
    if x is None:
        return 0.0, 0.0
    else:
        if ROTATION.interleaved:
            # Whole rows, and then taken apart: a thread reads neighbours, and a pair is in its own registers.
            channel = tl.arange(0, 2 * SHAPE.pairs)
            mask = real[:, None] & (channel < SHAPE.dim)[None, :]
            both = tl.load(_pointers(x, n, head, channel, SHAPE), mask=mask, other=0.0)
            first, second = tl.split(tl.reshape(both, [SHAPE.rows, SHAPE.pairs, 2]))
        else:
            channel, other, held = pair_channels(SHAPE, ROTATION)
            mask = real[:, None] & held[None, :]
            first = tl.load(_pointers(x, n, head, channel, SHAPE), mask=mask, other=0.0)
            second = tl.load(_pointers(x, n, head, other, SHAPE), mask=mask, other=0.0)
        return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store(x, n, head, exists, pairs, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    """x: None: nowhere."""
    if x is not None:
        _store(x, n, head, exists, pairs, SHAPE, ROTATION)


@triton.jit
def _store(x, n, head, exists, pairs, SHAPE: tl.constexpr, ROTATION: tl.constexpr):
    first, second = pairs[0].to(x.data.dtype.element_ty), pairs[1].to(x.data.dtype.element_ty)
    if ROTATION.interleaved:
        channel = tl.arange(0, 2 * SHAPE.pairs)
        mask = exists[:, None] & (channel < SHAPE.dim)[None, :]
        both = tl.reshape(tl.join(first, second), [SHAPE.rows, 2 * SHAPE.pairs])
        tl.store(_pointers(x, n, head, channel, SHAPE), both, mask=mask)
    else:
        channel, other, held = pair_channels(SHAPE, ROTATION)
        mask = exists[:, None] & held[None, :]
        tl.store(_pointers(x, n, head, channel, SHAPE), first, mask=mask)
        tl.store(_pointers(x, n, head, other, SHAPE), second, mask=mask)


@triton.jit
def zeros(SHAPE: tl.constexpr):
    rows: tl.constexpr = SHAPE.rows
    pairs: tl.constexpr = SHAPE.pairs
    return tl.zeros([rows, pairs], tl.float32), tl.zeros([rows, pairs], tl.float32)


@triton.jit
def add(sums, pairs):
    return sums[0] + pairs[0], sums[1] + pairs[1]


@triton.jit
def norm_pairs(pairs, real, weight, vectors, channels, SHAPE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """Normed pairs, or as they are where there is no `weight`.

    vectors: the weights of both channels, and for LayerNorm the biases. channels: how many are normed together.
    """
    a, b = pairs
    if weight is not None:
        a, b, rstd = _centred(a, b, channels, SHAPE, NORM, EPS)
        a, b = a * rstd * vectors[0], b * rstd * vectors[1]
        if NORM == "layer":
            real = real[:, None]
            a, b = a + tl.where(real, vectors[2], 0.0), b + tl.where(real, vectors[3], 0.0)
    return a, b


@triton.jit
def norm_gradient(
    grads, pairs, sums, weight, vectors, channels, SHAPE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr
):
    """Gradients of the pairs before the norm, and the sums for those of its weights, with these added."""
    da, db = grads
    wa, wb = sums
    if weight is not None:
        a, b, rstd = _centred(pairs[0], pairs[1], channels, SHAPE, NORM, EPS)
        a *= rstd
        b *= rstd
        wa += da * a
        wb += db * b
        da *= vectors[0]
        db *= vectors[1]
        mean = _mean(da * a + db * b, channels, SHAPE)
        if NORM == "layer":
            shift = _mean(da + db, channels, SHAPE)
            da -= shift
            db -= shift
        da, db = (da - a * mean) * rstd, (db - b * mean) * rstd
    return (da, db), (wa, wb)


@triton.jit
def _centred(a, b, channels, SHAPE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """The channels, for LayerNorm less their mean, and the inverse of their root mean square."""
    if NORM == "layer":
        mean = _mean(a + b, channels, SHAPE)
        held = (tl.arange(0, SHAPE.pairs) < SHAPE.dim // 2)[None, :]
        a, b = tl.where(held, a - mean, 0.0), tl.where(held, b - mean, 0.0)
    return a, b, tl.rsqrt(_mean(a * a + b * b, channels, SHAPE) + EPS)


@triton.jit
def _mean(x, channels, SHAPE: tl.constexpr):
    """Of a head [row, 1], or of all heads of the token."""
    if SHAPE.together:
        return tl.sum(tl.sum(x, axis=1), axis=0) / channels
    else:
        return (tl.sum(x, axis=1) / channels)[:, None]
