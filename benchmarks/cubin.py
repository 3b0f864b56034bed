"""What a compiled kernel costs, read from its cubin with the cuobjdump that Triton's wheel carries."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

from benchmarks.pipes import access_bytes
from benchmarks.sass import functions

_FUNCTION = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:\d+ LOCAL:(?P<local>\d+)")


@dataclass(frozen=True)
class Cubin:
    """Numbers of one cubin; the largest of its functions counts."""

    registers: int  # a thread
    spills: int  # bytes of local memory a thread: registers that did not fit
    instructions: int  # without the NOPs that fill the end up
    hgmma: int  # warpgroup matrix instructions, Hopper's way to its full rate
    wide_loads: int  # 16 bytes a thread from global memory: LDG, or LDGSTS, straight to shared memory
    wide_stores: int  # 16 bytes a thread to global memory


def disassemble(cubin: bytes) -> str:
    """What cuobjdump prints of it. Raises `subprocess.CalledProcessError` if it cannot read it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inspect(text: str) -> Cubin:
    """text: from `disassemble`. Raises ValueError if it lists no function."""
    usage = [{k: int(v) for k, v in m.groupdict().items()} for m in _FUNCTION.finditer(text)]
    if not usage:
        raise ValueError(f"cannot read the cubin: cuobjdump lists no function in it\n{text[:2000]}")
    code = [instruction for function in functions(text) for instruction in function]
    return Cubin(
        registers=max(f["registers"] for f in usage),
        spills=max(f["stack"] + f["local"] for f in usage),
        instructions=sum(i.op != "NOP" for i in code),
        hgmma=sum(i.op == "HGMMA" for i in code),
        wide_loads=sum(i.op in ("LDG", "LDGSTS") and access_bytes(i) == 16 for i in code),
        wide_stores=sum(i.op == "STG" and access_bytes(i) == 16 for i in code),
    )
