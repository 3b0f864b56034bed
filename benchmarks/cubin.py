"""What a compiled kernel costs, read from its cubin with the cuobjdump that Triton's wheel carries."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

# "        /*0010*/   @P0 LDG.E.128 R4, ...": a line a machine instruction, predicated or not.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)", re.MULTILINE)
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


def inspect(cubin: bytes) -> Cubin:
    """Disassemble `cubin`. Raises `subprocess.CalledProcessError` if cuobjdump cannot read it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = [{k: int(v) for k, v in m.groupdict().items()} for m in _FUNCTION.finditer(text)]
    if not functions:
        raise ValueError(f"cannot read the cubin: cuobjdump lists no function in it\n{text[:2000]}")
    names = [match["name"].split(".") for match in _INSTRUCTION.finditer(text)]
    return Cubin(
        registers=max(f["registers"] for f in functions),
        spills=max(f["stack"] + f["local"] for f in functions),
        instructions=sum(name[0] != "NOP" for name in names),
        hgmma=sum(name[0] == "HGMMA" for name in names),
        wide_loads=sum(name[0] in ("LDG", "LDGSTS") and "128" in name for name in names),
        wide_stores=sum(name[0] == "STG" and "128" in name for name in names),
    )
