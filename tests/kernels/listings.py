"""Compile the row kernels for Hopper and print, of each, its barriers and the loads that wait behind one, as JSON.

A process of its own (`python -m tests.kernels.listings`): the tests themselves may run in one that interprets kernels.
"""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import aot
from benchmarks.snapshot import Selection

CASES = ("adaln[C1152]/adaln", "gated_residual_adaln[C1152]/gated", "mlp_activation[gelu,H4608]/mlp")


def listing(launch: aot.Launch) -> str:
    """The launch's PTX."""
    gpu = GPUTarget("cuda", 90, 32)
    backend = make_backend(gpu)
    meta = {**launch.meta, "debug": False, "instrumentation_mode": ""}
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **meta)
    options, *rest = launch.kernel._pack_args(backend, meta, bound, specialization, options)
    compiled = triton.compile(ASTSource(launch.kernel, *rest), target=gpu, options=options.__dict__)
    return compiled.asm["ptx"]


def late_loads(ptx: str) -> int:
    """Loads from global memory behind the first barrier of the innermost loops, or of a kernel that has none there."""
    # A label, no other, and a branch back to it. (?=…): the search goes on inside of what it has found.
    loops = re.findall(r"^(?=(\$L__BB\w+):((?:(?!^\$L__BB).)*?)bra\S*\s+\1;)", ptx, flags=re.MULTILINE | re.DOTALL)
    walks = [body for _, body in loops if "bar.sync" in body]
    return sum(body[body.index("bar.sync") :].count("ld.global") for body in walks or [ptx] if "bar.sync" in body)


if __name__ == "__main__":
    found = {}
    for launch in aot.record("sm_90", Selection(["sm_90"], CASES)):
        ptx = listing(launch)
        found[launch.name] = {"late": late_loads(ptx), "barriers": ptx.count("bar.sync")}
    print(json.dumps(found))
