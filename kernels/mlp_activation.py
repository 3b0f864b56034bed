"""mlp_activation: the bias and the nonlinearity between the two products of an MLP; one pass each way."""

# ruff: noqa: RUF005 (Triton adds tuples and does not unpack them)

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._fold import fold
from sora_fast.kernels._launch import cdiv, launch, next_power_of_two


@dataclass(frozen=True)
class MlpActivationConfig:
    """Memory traffic alone. A thread asks for 64 bytes at once, 16 of each of 4 rows, or of both halves of 2. In bf16
    the assembler for sm_90 sends 32 to 64 of them off before it waits for the first: 60 to 96 KB a multiprocessor.

    The columns have one axis, so that the bias is laid out as the rows are: beside rows of two axes it brought every
    operand through shared memory, with 6 to 10 barriers a step of the backward pass.
    """

    columns: int = 1024  # 8 elements a thread; 4.5 blocks are the 4608 of DiT-XL
    num_warps: int = 4
    loads: int = 4  # 16 bytes each, before the first is waited for: rows of `x`, or (gated) halves of rows
    # Tokens in one partial sum of the bias's gradient: 32k tokens by 4608 columns make 1,280 programs, and the partials
    # are 0.5% of the traffic.
    chunk: int = 128

    def columns_for(self, width: int) -> int:
        """Columns of a block: no more than needed."""
        return min(self.columns, next_power_of_two(width))

    def rows_for(self, gated: bool) -> int:
        """Tokens that are read together."""
        return self.loads // (1 + gated)


class Form(NamedTuple):
    """What is computed: SwiGLU (gated) or GELU. erf: by the error function, not tanh. last: the second half is the one
    that gates, not the first."""

    gated: bool
    erf: bool = False
    last: bool = False


@lru_cache
def _planned(form: Form, width: int) -> tuple[int, int, dict[str, Any]]:
    """Rows and columns of a block, of so many columns of output, and the constants of both kernels."""
    config = MlpActivationConfig()
    columns, rows = config.columns_for(width), config.rows_for(form.gated)
    numbers = {"WIDTH": width, "GATED": form.gated, "ERF": form.erf, "GATE": width * form.last}
    return rows, columns, {**numbers, "ROWS": rows, "BLOCK_C": columns, "num_warps": config.num_warps}


def mlp_activation_forward(x: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    """x [N, H] of any strides, bias [H] → GELU of x + bias, [N, H], or SwiGLU of its halves, [N, H / 2]."""
    tokens, width = x.shape[0], x.shape[1] // (1 + form.gated)
    out = x.new_empty(tokens, width)
    rows, columns, meta = _planned(form, width)
    launch(
        *(mlp_activation_forward_kernel, (cdiv(tokens, rows), cdiv(width, columns))),
        *(x, bias, out, tokens, x.stride(), 0 if bias is None else bias.stride(0)),
        **meta,
    )
    return out


def mlp_activation_backward(
    d_out: Tensor, x: Tensor, bias: Tensor | None, form: Form, *, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, H], contiguous, and of the bias [H] fp32, or [0] where nobody asks for it."""
    tokens, width = d_out.shape
    d_x = x.new_empty(x.shape)
    chunk = MlpActivationConfig.chunk
    chunks = cdiv(tokens, chunk)
    partials = torch.empty(chunks, x.shape[1], dtype=torch.float32, device=x.device) if bias_gradient else None
    _, columns, meta = _planned(form, width)
    launch(
        *(mlp_activation_backward_kernel, (chunks, cdiv(width, columns)), d_out, x, bias, d_x, partials, tokens),
        *(d_out.stride(), x.stride(), 0 if bias is None else bias.stride(0)),
        CHUNK=chunk,
        **meta,
    )
    return d_x, x.new_empty(0, dtype=torch.float32) if partials is None else fold(partials)


@triton.jit
def mlp_activation_forward_kernel(
    x, bias, out, tokens, x_strides, bias_stride,
    WIDTH: tl.constexpr, GATED: tl.constexpr, ERF: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < WIDTH
    rows = _load(x, x_strides, first, tokens, column, inside, WIDTH, GATED, GATE, ROWS)
    biases = _load_bias(bias, bias_stride, column, inside, WIDTH, GATED, GATE)
    for i in tl.static_range(ROWS):
        u = rows[i][0].to(tl.float32) + biases[0]
        result = u * (tl.sigmoid(u) if GATED else _gelu_gate(u, ERF)[0])
        if GATED:
            result *= rows[i][1].to(tl.float32) + biases[1]
        token = first + i
        tl.store(out + token.to(tl.int64) * WIDTH + column, result, mask=inside & (token < tokens))


@triton.jit
def mlp_activation_backward_kernel(
    d_out, x, bias, d_x, partials, tokens, d_out_strides, x_strides, bias_stride,
    WIDTH: tl.constexpr, GATED: tl.constexpr, ERF: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < WIDTH
    biases = _load_bias(bias, bias_stride, column, inside, WIDTH, GATED, GATE)
    total, total_value = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for first in range(chunk * CHUNK, tl.minimum(tokens, (chunk + 1) * CHUNK), ROWS):
        gradients = _load(d_out, d_out_strides, first, tokens, column, inside, WIDTH, False, 0, ROWS)
        rows = _load(x, x_strides, first, tokens, column, inside, WIDTH, GATED, GATE, ROWS)
        for i in tl.static_range(ROWS):
            token = first + i
            # A row past the last is read as zeros, and the gradients of zeros are zeros.
            exists = inside & (token < tokens)
            gradient, u = gradients[i][0].to(tl.float32), rows[i][0].to(tl.float32) + biases[0]
            written = d_x + token.to(tl.int64) * H + column
            if GATED:
                gate = tl.sigmoid(u)
                d_value = gradient * u * gate
                tl.store(written + (WIDTH - GATE), d_value, mask=exists)
                total_value += d_value
                d_u = gradient * (rows[i][1].to(tl.float32) + biases[1]) * (gate + u * gate * (1.0 - gate))
            else:
                gate, slope = _gelu_gate(u, ERF)
                d_u = gradient * (gate + slope)
            tl.store(written + GATE, d_u, mask=exists)
            total += d_u
    if partials is not None:
        place = partials + chunk.to(tl.int64) * H + column
        tl.store(place + GATE, total, mask=inside)
        if GATED:
            tl.store(place + (WIDTH - GATE), total_value, mask=inside)


@triton.jit
def _load(
    x, strides, first, tokens, column, inside,
    WIDTH: tl.constexpr, GATED: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each of ROWS tokens from `first` on, as stored: its columns from GATE on, and (GATED) those of the other half.
    Zeros for tokens past the last. All are on their way before the first is used."""
    rows = ()
    for i in tl.static_range(ROWS):
        token = first + i
        place = x + token.to(tl.int64) * strides[0] + column.to(tl.int64) * strides[1]
        exists = inside & (token < tokens)
        row = (tl.load(place + GATE * tl.cast(strides[1], tl.int64), mask=exists, other=0.0),)
        if GATED:
            row = row + (tl.load(place + (WIDTH - GATE) * tl.cast(strides[1], tl.int64), mask=exists, other=0.0),)
        rows = rows + (row,)
    return rows


@triton.jit
def _load_bias(bias, stride, column, inside, WIDTH: tl.constexpr, GATED: tl.constexpr, GATE: tl.constexpr):
    """In fp32, of the columns from GATE on and (GATED) of the other half; zeros without a bias."""
    if bias is None:
        return tl.zeros(column.shape, tl.float32), tl.zeros(column.shape, tl.float32)
    else:
        place = bias + column.to(tl.int64) * stride
        first = tl.load(place + GATE * tl.cast(stride, tl.int64), mask=inside, other=0.0).to(tl.float32)
        second = first
        if GATED:
            second = tl.load(place + (WIDTH - GATE) * tl.cast(stride, tl.int64), mask=inside, other=0.0).to(tl.float32)
        return first, second


@triton.jit
def _gelu_gate(u, ERF: tl.constexpr):
    """g and u · g'(u), where g = Φ(u), of the normal distribution. Not ERF: g = (1 + tanh v) / 2 = sigmoid 2v in its
    place, with v = √(2/π) (u + 0.044715 u³)."""
    if ERF:
        # Of the largest numbers the square is infinite, and its exponential 0.
        return 0.5 + 0.5 * tl.erf(0.7071067811865476 * u), 0.3989422804014327 * u * tl.exp(-0.5 * u * u)
    else:
        # Past 16, g is 0 or 1 in fp32 and its slope 0; the cube of a larger number might overflow.
        u = tl.minimum(tl.maximum(u, -16.0), 16.0)
        square = 0.044715 * u * u
        gate = tl.sigmoid(1.5957691216057308 * u * (1.0 + square))
        return gate, 1.5957691216057308 * u * (1.0 + 3.0 * square) * gate * (1.0 - gate)
