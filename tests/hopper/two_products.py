"""Prints the PTX that Triton makes of a small attention for Hopper; a process of its own, since the interpreter that
other tests run leaves its marks in Triton's language."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROWS, KEYS, DIM = 64, 128, 128


@triton.jit
def two_products(q, k, v, out, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr):
    rows, keys, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[:, None], tl.arange(0, DIM)[None, :]
    scores = tl.dot(tl.load(q + rows * DIM + columns), tl.load(k + keys * DIM + columns).T)
    weighted = tl.dot(scores.to(tl.bfloat16), tl.load(v + keys * DIM + columns))
    tl.store(out + rows * DIM + columns, weighted)


if __name__ == "__main__":
    types = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "out": "*fp32"}
    source = ASTSource(two_products, types, {"ROWS": ROWS, "KEYS": KEYS, "DIM": DIM})
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"])
