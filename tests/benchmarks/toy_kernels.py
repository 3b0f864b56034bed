"""Run as a program, without TRITON_INTERPRET: compile a kernel twice, the second time with too few registers, and one
that loops."""

import json
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from benchmarks.aot import Launch, compile_launch


@triton.jit
def _product(a, b, c, stride, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)[:, None] * stride
    column = tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a + row + column), tl.load(b + row + column))
    tl.store(c + row + column, product.to(c.dtype.element_ty))


@triton.jit
def _sum_of_products(a, b, c, stride, steps, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)[:, None] * stride
    column = tl.arange(0, SIZE)[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for step in range(steps):
        start = step * SIZE
        total = tl.dot(tl.load(a + start + row + column), tl.load(b + start + row + column), total)
    tl.store(c + row + column, total.to(c.dtype.element_ty))


if __name__ == "__main__":
    matrix = torch.empty(128, 128, dtype=torch.bfloat16)
    arguments = (matrix, matrix, matrix, matrix.stride(0))
    options = [{"SIZE": 128, "num_warps": 4}, {"SIZE": 128, "num_warps": 4, "maxnreg": 96}]
    for target in ("sm_80", "sm_90", "sm_100"):
        rows = [compile_launch(Launch("product", _product, arguments, meta), target) for meta in options]
        looping = Launch("sum", _sum_of_products, (*arguments, 7), {"SIZE": 128, "num_warps": 8})
        rows.append(compile_launch(looping, target))
        print(json.dumps([asdict(row) | {"problem": row.problem} for row in rows]))
