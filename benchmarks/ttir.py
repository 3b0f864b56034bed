"""What a kernel's source asks for, read from the first of Triton's intermediate languages (`compiled.asm["ttir"]`)."""

import re

# tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32xbf16> * tensor<32x256xbf16> -> tensor<64x256xf32>
_DOT = re.compile(r"\btt\.dot .*tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>")


def loop_flops(ttir: str) -> list[int]:
    """FLOPs of one iteration of each innermost loop with products, in the order of the source.

    A block computes them once, whatever its warps do. Columns that only fill a power of two up count.
    """
    found: list[int] = []
    regions: list[int | None] = []  # those that are open; of a loop that may be an innermost one: its FLOPs so far
    for line in map(str.strip, ttir.splitlines()):
        if line.startswith("}") and regions and (flops := regions.pop()):
            found.append(flops)
            regions = [None] * len(regions)
        if match := _DOT.search(line):
            m, k, n = map(int, match.groups())
            loop = max((depth for depth, flops in enumerate(regions) if flops is not None), default=None)
            if loop is not None:
                regions[loop] += 2 * m * n * k
        if line.endswith("{"):
            regions.append(0 if line.startswith("scf.for") or " = scf.for" in line else None)
    return found
