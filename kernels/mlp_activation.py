"""mlp_activation: the bias and the nonlinearity between the two products of an MLP; one pass each way."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_fast.kernels._fold import fold
from sora_fast.kernels._launch import cdiv, launch, next_power_of_two
from sora_fast.kernels._rows import load_fp32


@dataclass(frozen=True)
class MlpActivationConfig:
    """Not measured yet. Memory traffic alone: a thread has 16 bytes of every tensor in flight, twice in fp32."""

    tokens: int = 2
    columns: int = 512  # divides the 4608 of DiT-XL; 1 KB of a row in bf16
    num_warps: int = 4  # 8 elements a thread
    # Tokens in one partial sum of the bias's gradient: 32k tokens by 4608 columns make 2,304 programs, and the partials
    # are 0.5% of the traffic.
    chunk: int = 128

    def columns_for(self, width: int) -> int:
        """Columns of a block: no more than needed."""
        return min(self.columns, next_power_of_two(width))


def mlp_activation_forward(x: Tensor, bias: Tensor | None, *, gated: bool) -> Tensor:
    """x [N, H] of any strides, bias [H] → tanh-GELU of x + bias, [N, H]; gated: SwiGLU of its halves, [N, H / 2]."""
    config = MlpActivationConfig()
    tokens, width = x.shape[0], x.shape[1] // (1 + gated)
    out = x.new_empty(tokens, width)
    columns = config.columns_for(width)
    launch(
        *(mlp_activation_forward_kernel, (cdiv(tokens, config.tokens), cdiv(width, columns))),
        *(x, bias, out, tokens, x.stride(), 0 if bias is None else bias.stride(0)),
        **{"WIDTH": width, "GATED": gated, "BLOCK_N": config.tokens, "BLOCK_C": columns},
        num_warps=config.num_warps,
    )
    return out


def mlp_activation_backward(
    d_out: Tensor, x: Tensor, bias: Tensor | None, *, gated: bool, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, H], contiguous, and of the bias [H] fp32, or [0] where nobody asks for it."""
    config = MlpActivationConfig()
    tokens, width = d_out.shape
    d_x = x.new_empty(x.shape)
    chunks = cdiv(tokens, config.chunk)
    partials = torch.empty(chunks, x.shape[1], dtype=torch.float32, device=x.device) if bias_gradient else None
    columns = config.columns_for(width)
    launch(
        *(mlp_activation_backward_kernel, (chunks, cdiv(width, columns)), d_out, x, bias, d_x, partials, tokens),
        *(d_out.stride(), x.stride(), 0 if bias is None else bias.stride(0)),
        **{"WIDTH": width, "GATED": gated, "BLOCK_N": config.tokens, "BLOCK_C": columns, "CHUNK": config.chunk},
        num_warps=config.num_warps,
    )
    return d_x, x.new_empty(0, dtype=torch.float32) if partials is None else fold(partials)


@triton.jit
def mlp_activation_forward_kernel(
    x, bias, out, tokens, x_strides, bias_stride,
    WIDTH: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    column = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (token < tokens) & (column < WIDTH)
    u = _biased(x, x_strides, bias, bias_stride, token, column, inside, WIDTH)
    if GATED:
        result = u * tl.sigmoid(u) * _biased(x, x_strides, bias, bias_stride, token, column + WIDTH, inside, 2 * WIDTH)
    else:
        result = u * _gelu_gate(u)[0]
    tl.store(out + token.to(tl.int64) * WIDTH + column, result, mask=inside)


@triton.jit
def mlp_activation_backward_kernel(
    d_out, x, bias, d_x, partials, tokens, d_out_strides, x_strides, bias_stride,
    WIDTH: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    chunk = tl.program_id(0)
    column = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    total_value = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(chunk * CHUNK, tl.minimum(tokens, (chunk + 1) * CHUNK), BLOCK_N):
        token = (first + tl.arange(0, BLOCK_N))[:, None]
        inside = (token < tokens) & (column < WIDTH)
        gradient = load_fp32(d_out, d_out_strides, token, column, inside)
        u = _biased(x, x_strides, bias, bias_stride, token, column, inside, WIDTH)
        written = d_x + token.to(tl.int64) * H + column
        if GATED:
            value = _biased(x, x_strides, bias, bias_stride, token, column + WIDTH, inside, H)
            gate = tl.sigmoid(u)
            d_value = gradient * u * gate
            tl.store(written + WIDTH, d_value, mask=inside)
            total_value += tl.where(inside, d_value, 0.0)
            d_u = gradient * value * (gate + u * gate * (1.0 - gate))
        else:
            gate, slope = _gelu_gate(u)
            d_u = gradient * (gate + slope)
        tl.store(written, d_u, mask=inside)
        total += tl.where(inside, d_u, 0.0)
    if partials is not None:
        place = partials + chunk.to(tl.int64) * H + column
        tl.store(place, tl.sum(total, axis=0)[None, :], mask=column < WIDTH)
        if GATED:
            tl.store(place + WIDTH, tl.sum(total_value, axis=0)[None, :], mask=column < WIDTH)


@triton.jit
def _biased(x, x_strides, bias, bias_stride, token, column, inside, END: tl.constexpr):
    u = load_fp32(x, x_strides, token, column, inside)
    if bias is not None:
        u += tl.load(bias + column.to(tl.int64) * bias_stride, mask=column < END, other=0.0).to(tl.float32)
    return u


@triton.jit
def _gelu_gate(u):
    """g = (1 + tanh v) / 2 = sigmoid 2v with v = √(2/π) (u + 0.044715 u³), and u · g'(u)."""
    # Past 16, g is 0 or 1 in fp32 and its slope 0; the cube of a larger number might overflow.
    u = tl.minimum(tl.maximum(u, -16.0), 16.0)
    square = 0.044715 * u * u
    gate = tl.sigmoid(1.5957691216057308 * u * (1.0 + square))
    return gate, 1.5957691216057308 * u * (1.0 + 3.0 * square) * gate * (1.0 - gate)
